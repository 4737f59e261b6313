"""A folder's genai_config.json cannot make the library do what no model needs."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recollect.conversation.loading import load
from recollect.errors import RuntimeFailure, UnsupportedModelError
from recollect.models.catalog import LocalModel
from recollect.models.prepare import prepare
from recollect.types import SamplingParams

SESSION = ("model", "decoder", "session_options")


@pytest.fixture
def folder(onnx_model_folder: Path) -> Path:
    return onnx_model_folder


@pytest.fixture
def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())
    return content


@pytest.fixture
def changed(folder: Path, config: dict[str, Any], tmp_path: Path) -> Callable[..., LocalModel]:
    """Return what sets one value in the config and opens the folder."""

    def change(place: tuple[str, ...], value: object, **options: Any) -> LocalModel:
        content = copy.deepcopy(config)
        inner = content
        for name in place[:-1]:
            inner = inner.setdefault(name, {})
        inner[place[-1]] = value
        (folder / "genai_config.json").write_text(json.dumps(content))
        return prepare(str(folder), home=tmp_path / "home", **options)

    return change


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((*SESSION, "custom_ops_library"), "libfoo.so"),
        ((*SESSION, "custom_ops_library"), "/usr/lib/libfoo.so"),
        ((*SESSION, "custom_ops_library"), 5),
        ((*SESSION, "enable_profiling"), "/tmp/trace"),  # noqa: S108 - never written
        ((*SESSION, "ep.context_file_path"), "/etc/x"),
        ((*SESSION, "ep.context_enable"), "1"),
        ((*SESSION, "session.optimized_model_filepath"), "x"),
        ((*SESSION, "session.model_external_initializers_file_folder_path"), "/etc"),
        ((*SESSION, "intra_op_num_threads"), 10**9),
        ((*SESSION, "config_entries"), {"dd_cache": "/x"}),
        ((*SESSION, "log_id"), ["x"]),
        ((*SESSION, "provider_options"), [{"QNN": {"backend_path": "evil.dll"}}]),
        ((*SESSION, "provider_options"), [{"OpenVINO": {"cache_dir": "/etc"}}]),
        ((*SESSION, "provider_options"), [{"Tensorrt": {"trt_extra_plugin_lib_paths": "x"}}]),
        ((*SESSION, "provider_options"), [{"VitisAI": {"config_file": "/etc/passwd"}}]),
        ((*SESSION, "provider_options"), [{"RyzenAI": {"external_data_file": "../x"}}]),
        ((*SESSION, "provider_options"), "cpu"),
        (("model", "decoder", "filename"), "../model.onnx"),
        (("model", "decoder", "filename"), "/etc/passwd"),
        (("model", "decoder", "filename"), "C:model.onnx"),
        (("model", "decoder", "filename"), "..\\model.onnx"),
        (("model", "decoder", "filename"), "model.onnx\0"),
        (("model", "decoder", "filename"), 5),
        (("model", "decoder", "filename"), "model.onnx.data"),
        (("model", "decoder", "inputs", "past_key_names"), "%s%n"),
        (("model", "decoder", "inputs", "past_key_names"), "%d%d"),
        (("model", "decoder", "outputs", "logits"), {}),
        (("model", "decoder", "pipeline"), [{"a": {"session_options": {"enable_profiling": "x"}}}]),
        (("model", "decoder", "pipeline"), {"a": {"filename": "../x"}}),
        (("model", "decoder", "head_size"), float("nan")),
        (("model", "decoder", "num_hidden_layers"), 0),
        (("model", "vision"), {"config_filename": "/etc/passwd"}),
        (("model", "draft"), {"filename": "model.onnx"}),
        (("model", "tokenizer_dir"), "/etc"),
        (("model", "vocab_size"), True),
        (("model", "vocab_size"), "300"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_refused_by_name(
    changed: Callable[..., LocalModel], place: tuple[str, ...], value: object
) -> None:
    with pytest.raises(UnsupportedModelError, match=place[-1] if len(place) > 2 else "model"):
        changed(place, value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((*SESSION, "intra_op_num_threads"), 4),
        ((*SESSION, "session.set_denormal_as_zero"), "1"),
        ((*SESSION, "provider_options"), [{"cuda": {"enable_cuda_graph": "0"}}]),
        ((*SESSION, "provider_options"), [{"CPUExecutionProvider": {}}]),
        (
            (*SESSION, "provider_options"),
            [{"QNN": {"device_filtering_options": {"hardware_device_type": "npu"}}}],
        ),
        ((*SESSION, "provider_options"), [{"RyzenAI": {"external_data_file": "model.onnx.data"}}]),
        (("model", "decoder", "pipeline"), [{"a": {"filename": "model.onnx", "inputs": ["x"]}}]),
        (("model", "decoder", "sliding_window"), {"window_size": 128, "layers": [0]}),
        (("model", "eos_token_id"), 5),
    ],
)
def test_what_models_do_say_is_passed_on(
    changed: Callable[..., LocalModel], place: tuple[str, ...], value: object
) -> None:
    passed: Any = changed(place, value).onnx_config
    for name in place:
        passed = passed[name]
    assert passed == value


def test_a_pipeline_may_be_one_object(changed: Callable[..., LocalModel]) -> None:
    stages = {"a": {"filename": "model.onnx", "outputs": ["x"]}, "b": {"filename": "model.onnx"}}
    passed: Any = changed(("model", "decoder", "pipeline"), stages).onnx_config
    assert passed["model"]["decoder"]["pipeline"] == [stages]


def test_how_to_choose_tokens_is_not_the_librarys_business(
    changed: Callable[..., LocalModel],
) -> None:
    """A thousand beams would take a thousand times the KV."""
    passed = changed(("search", "num_beams"), 1000).onnx_config
    assert passed is not None
    assert passed["search"] == {"past_present_share_buffer": False}
    assert set(passed) == {"model", "search"}


def test_one_name_with_two_values_is_refused(folder: Path, tmp_path: Path) -> None:
    """Two readers may each take another one."""
    text = (folder / "genai_config.json").read_text()
    doubled = text.replace('"vocab_size": 300', '"vocab_size": 300, "vocab_size": 301')
    (folder / "genai_config.json").write_text(doubled)
    with pytest.raises(UnsupportedModelError, match="one name two values"):
        prepare(str(folder), home=tmp_path / "home")


@pytest.fixture
def native(folder: Path, tmp_path: Path) -> Path:
    """Return a file that is written as soon as the folder's native library is loaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    marker = tmp_path / "marker"
    source = tmp_path / "evil.c"
    source.write_text(
        "#include <stdio.h>\n"
        "__attribute__((constructor)) static void run(void) {\n"
        f'  FILE *file = fopen("{marker}", "w"); if (file) fclose(file);\n'
        "}\n"
    )
    library = folder / "libevil.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)  # noqa: S603
    return marker


def test_native_code_of_a_folder_does_not_run(
    changed: Callable[..., LocalModel], folder: Path, native: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(UnsupportedModelError, match=r"--allow-native-code libevil\.so"):
        changed((*SESSION, "custom_ops_library"), "libevil.so")
    with pytest.raises(UnsupportedModelError, match=r"--allow-native-code libevil\.so"):
        load(folder, home=tmp_path / "home")
    with pytest.raises(UnsupportedModelError, match="was allowed"):
        load(folder, home=tmp_path / "home", allow_native_code="libother.so")
    assert not native.exists()


@pytest.mark.slow
def test_native_code_runs_where_it_was_allowed_by_name(
    changed: Callable[..., LocalModel], folder: Path, native: Path, tmp_path: Path
) -> None:
    """The library here defines no operators, which ONNX Runtime tells after it has run."""
    pytest.importorskip("onnxruntime_genai")
    place = (*SESSION, "custom_ops_library")
    assert changed(place, "libevil.so", allow_native_code="libevil.so").native_library == (
        folder / "libevil.so"
    )
    with pytest.raises(UnsupportedModelError, match="RegisterCustomOps"):
        load(folder, home=tmp_path / "home", allow_native_code="libevil.so")
    assert native.exists()


def test_what_was_checked_is_what_runs(
    folder: Path,
    native: Path,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is exchanged between the check and the load, and nothing comes of it."""
    pytest.importorskip("onnxruntime_genai")
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "libevil.so"
    from recollect.conversation import loading

    def prepare_then_exchange(*arguments: Any, **options: Any) -> LocalModel:
        local = prepare(*arguments, **options)
        (folder / "genai_config.json").write_text(json.dumps(config))
        return local

    (folder / ".loop").symlink_to(".loop")  # hidden, so nobody looks at it
    monkeypatch.setattr(loading, "prepare", prepare_then_exchange)
    with load(folder, home=tmp_path / "home") as model:
        session = model.session(params=SamplingParams(max_tokens=3))
        assert session.respond("hello").usage.prompt_tokens > 0
    assert not native.exists()


def test_nothing_is_left_in_the_temporary_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_genai")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with load(folder, home=tmp_path / "home"):
        assert len(list(temporary.iterdir())) == 1
    assert list(temporary.iterdir()) == []
    (folder / "model.onnx.data").write_bytes(b"too short")
    with pytest.raises((UnsupportedModelError, RuntimeFailure)):
        load(folder, home=tmp_path / "home")
    assert list(temporary.iterdir()) == []


def test_a_snapshot_of_the_hub_cache_runs_through_its_links(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    with load(snapshot, home=tmp_path / "home") as model:
        session = model.session(params=SamplingParams(max_tokens=3))
        assert session.respond("hello").usage.prompt_tokens > 0
