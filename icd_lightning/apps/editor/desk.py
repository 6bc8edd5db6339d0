"""What all parts of the page share: the editor, its queue, the place for what went wrong, how values are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import escape
from PIL import Image

from icd_lightning.apps.editor.engine import MAX_PIXELS, Editor
from icd_lightning.data.images import read_picture

Values = Mapping[Any, Any]
"""Of components, as a browser sent them: nothing is checked."""
Handler = Callable[[Values], dict[Any, Any]]
"""Values of the inputs to new values of outputs."""


@dataclass(frozen=True)
class Desk:
    """The editor, and the notice that says what a user got wrong."""

    editor: Editor
    notice: gr.HTML

    def call(self, handler: Handler, inputs: set, outputs: Sequence, name: str | None = None) -> dict[str, Any]:
        """What an event of Gradio's takes to call the handler, one call of the page at a time, and to tell its errors.

        Values come as they were sent: what Gradio would do first is to open pictures. A name makes the event one of
        the page's API.
        """
        return {
            "fn": lambda values: self._answer(handler, values),
            "inputs": inputs,
            "outputs": [self.notice, *outputs],
            "preprocess": False,
            "api_name": name,
            "api_visibility": "public" if name else "private",
            "concurrency_id": "pipeline",
            "concurrency_limit": 1,
            "trigger_mode": "always_last",
            "show_progress": "minimal",
        }

    def _answer(self, handler: Handler, values: Values) -> dict[Any, Any]:
        try:
            return {self.notice: gr.HTML(visible=False), **handler(values)}
        except (ValueError, OSError) as error:
            message = str(error)
            for file in [value["path"] for value in values.values() if isinstance(value, dict) and value.get("path")]:
                message = message.replace(f"{Path(file).parent}{os.sep}", "")  # where uploads lie is nobody's business
            return {self.notice: gr.HTML(f'<p role="alert">{escape(message)}</p>', visible=True)}


def read_number(value: Any, name: str) -> float:
    """A number that a browser sent; ValueError for anything else."""
    if not (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max):
        raise ValueError(f"{name} {value!r} must be a finite number")
    return value


def read_upload(value: Any) -> Image.Image:
    """The picture that an image component holds; ValueError if there is none, or none that can be read."""
    if not (isinstance(value, dict) and isinstance(value.get("path"), str)):
        raise ValueError("there is no picture: upload one, or choose an example")
    return read_picture(value["path"], max_pixels=MAX_PIXELS)


def shown(label: str, value: Image.Image | None = None, *, visible: bool = True) -> gr.Image:
    """A picture that the page shows and offers for download, as it was made."""
    buttons = ["download", "fullscreen"]
    return gr.Image(value, label=label, format="png", interactive=False, buttons=buttons, visible=visible)


def guidance_sliders(guidance_scale: float, tau: float) -> tuple[gr.Slider, gr.Slider]:
    most = 2 * guidance_scale + 4
    scale = gr.Slider(1, most, guidance_scale, step=0.5, label="Guidance w", info="more follows the prompt")
    return scale, gr.Slider(0, 1, tau, step=0.05, label="tau", info="more edits, keeps less")
