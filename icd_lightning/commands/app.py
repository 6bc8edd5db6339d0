"""`icd app`: the web editor."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from threading import Event
from typing import Any

from icd_lightning.apps.listening import listen
from icd_lightning.commands.weights import Weights, find_device

log = logging.getLogger(__name__)


def app(*, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> None:
    """Edit pictures in a browser, with any model: a server that goes on until Ctrl-C.

    icd app
    icd app --port 7870 --model SD15_FOLDER --guided_unet sd15_cfg_distill.pt \\
      --forward iCD-SD15-forward_19_259_519_779.safetensors --reverse iCD-SD15-reverse_259_519_779_999.safetensors

    Nobody signs in: whoever reaches the address uses this machine. It sends nothing to anybody else.

    Args:
        host: Address to listen at; 127.0.0.1 is for this machine alone, 0.0.0.0 for all that reach it.
        port: Port to listen at; by default, or with 0, the first free one from 7860 on.
    """
    weights = Weights(**options)
    listen(host, port or 0).close()
    if find_spec("gradio") is None:
        raise ValueError("icd app needs gradio, which is not installed: pip install '.[app]' in the repository")
    from icd_lightning.apps.editor.page import EditorPage
    from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

    students = {name: getattr(weights, name) for name in ("forward", "reverse", "boundaries", "lora_alpha")}
    pipe = InvertibleConsistencyPipeline.from_pretrained(weights.family(), **students)
    page = EditorPage(pipe.to(find_device(weights.device)))
    _, address, _ = page.launch(server_name=host, server_port=port or None, prevent_thread_lock=True)
    log.info("%s (Ctrl-C ends it)", address)
    try:
        wait()
    finally:
        page.close(verbose=False)  # which removes the pictures that were sent


def wait() -> None:
    Event().wait()
