#!/bin/bash
# Build llama.cpp for the graphics card of this machine, and measure recollect on it: benchmarks/graphics_card.py.
#
#     benchmarks/graphics_card.sh FOLDER OUT [cpu]
#
# FOLDER has llama.cpp's source as llama.tar.gz, wheels of what is missing here, and maybe a GGUF file with a
# vocabulary, vocabulary.gguf; nothing is fetched. Where it has built libraries of an earlier run, they are used.
# OUT gets results.json, logs, and the libraries in pieces below 16 MiB. With "cpu" a small model on processors.
set -u -o pipefail
folder=$(realpath "$1") out=$(realpath "$2") kind=${3:-card}
repository=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
begun=$SECONDS
cores=$(nproc)

if compgen -G "$folder/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$folder"/*.whl ||
        exit 2
fi
export PYTHONPATH="$repository/src:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# CUDA's linear algebra: of the toolkit, or else of the Python package that PyTorch brings.
links=$work/links headers=/usr/local/cuda/include
mkdir -p "$links"
if [ "$kind" = card ]; then
    places=(/usr/local/cuda/lib64 $(python3 -c 'import sys; print(*(p + "/nvidia/cu13/lib" for p in sys.path))'))
    for name in cublas cublasLt; do
        found=$(find -L "${places[@]}" -maxdepth 1 -name "lib$name.so*" 2>/dev/null | head -n 1)
        [ -n "$found" ] || { echo "lib$name is not on this machine" && exit 4; }
        ln -sf "$found" "$links/lib$name.so"
        ln -sf "$found" "$links/lib$name.so.13"
    done
    beside=$(dirname "$(readlink -f "$links/libcublas.so")")/../include
    [ -f "$beside/cublas_v2.h" ] && headers=$(realpath "$beside")
    [ -f "$headers/cublas_v2.h" ] || { echo "cublas_v2.h is not on this machine" && exit 4; }
    export LD_LIBRARY_PATH=$links:/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

libraries=$work/build/bin
if compgen -G "$folder/libraries.tar.xz.*" >/dev/null; then
    mkdir -p "$libraries"
    cat "$folder"/libraries.tar.xz.* | tar -xJ -C "$libraries"
else
    tar -xzf "$folder/llama.tar.gz" -C "$work"
    options=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
        '-DCMAKE_INSTALL_RPATH=$ORIGIN' -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF
        -DLLAMA_BUILD_IS_DEV=OFF -DGGML_CCACHE=OFF -DGGML_NATIVE=ON)
    if [ "$kind" = card ]; then
        options+=(-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90 -DGGML_CUDA_FA_ALL_QUANTS=OFF -DGGML_CUDA_NCCL=OFF
            -DGGML_CUDA_NO_VMM=ON "-DCMAKE_LIBRARY_PATH=$links" "-DCMAKE_CUDA_FLAGS=-I$headers"
            "-DCMAKE_CXX_FLAGS=-I$headers" "-DCUDA_cublas_LIBRARY=$links/libcublas.so"
            "-DCUDA_cublasLt_LIBRARY=$links/libcublasLt.so")
    fi
    cmake -G Ninja -S "$work/llama.cpp" -B "$work/build" "${options[@]}" >"$out/build.log" 2>&1 &&
        timeout "${BUILD_SECONDS:-360}" ninja -C "$work/build" -j "$cores" llama ggml >>"$out/build.log" 2>&1 || {
        tail -n 40 "$out/build.log"
        echo "the build failed or took too long, after $((SECONDS - begun)) s"
        exit 3
    }
    find "$libraries" -name '*.so.*.*.*' -exec strip --strip-unneeded {} +
    tar -c -C "$libraries" . | xz -T4 -4 | split -b 15M - "$out/libraries.tar.xz." &
    packing=$!
fi
echo "built after $((SECONDS - begun)) s"
ls -la "$libraries"

export RECOLLECT_LLAMA_LIBRARY=$libraries/libllama.so
[ -f "$folder/vocabulary.gguf" ] && export RANDOM_MODEL_VOCABULARY=$folder/vocabulary.gguf
[ "$kind" = cpu ] && small=--small
# Where the compiler finds a static C++ runtime alone, each library has one of its own, whose locales do not go
# together: loading a model is a segmentation fault, unless all of them use the one that is loaded first.
if ! ldd "$libraries/libggml-base.so" | grep -q 'libstdc++'; then
    runtime=$(ldconfig -p | grep -o '/.*libstdc++\.so\.6$' | head -n 1)
    export LD_PRELOAD=$runtime
fi
left=$((${ALL_SECONDS:-570} - SECONDS + begun))
python3 "$repository/benchmarks/graphics_card.py" --results "$out/results.json" --seconds "$left" ${small:-} |
    tee "$out/results.log"
status=$?
unset LD_PRELOAD
[ -n "${packing:-}" ] && wait "$packing"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/card.txt" 2>&1
rm -rf "$work"
echo "all of it took $((SECONDS - begun)) s"
exit $status
