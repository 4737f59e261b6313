"""
System prompts that every key may reuse: read again whenever a model is loaded.

On a thread of its own, and while the engine has nothing else to do: nobody waits for it.
"""

import logging
import threading
from collections.abc import Sequence

from recollect.conversation.model import Model, beginning
from recollect.errors import MisuseError, RecollectError

_log = logging.getLogger(__name__)


def publish_later(model: Model, prompts: Sequence[str]) -> threading.Thread:
    """
    Begin to publish system prompts, and return the thread that does.

    It ends with the model. What cannot be published is told in the log, and the others are.
    """
    thread = threading.Thread(
        target=_publish, args=[model, prompts], name="recollect-public", daemon=True
    )
    thread.start()
    return thread


def _publish(model: Model, prompts: Sequence[str]) -> None:
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = beginning(model.prompts, "", system=prompt)
            made = model.public.publish(ids, idle=True)
        except MisuseError:
            return  # the model was given up meanwhile
        except RecollectError as error:
            _log.warning("public prompt %d is not shared on %s: %s", number, model.name, error)
        else:
            _log.info(
                "public prompt %d: %d tokens, %d of them read in %.1f s",
                number,
                made.tokens,
                made.computed_tokens,
                made.seconds,
            )
