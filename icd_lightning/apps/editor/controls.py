"""What all parts of the page share, and what a user sets of an edit: components of Gradio, how values are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from markupsafe import escape
from PIL import Image

from icd_lightning.apps.editor.engine import MAX_PIXELS, Editor, Wish
from icd_lightning.data.images import read_picture
from icd_lightning.editing.injection import usual_control
from icd_lightning.editing.limits import Control, Injection, PromptToPrompt, read_blend, read_factors
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

Values = Mapping[Any, Any]  # of components, as a browser sent them: nothing is checked
Handler = Callable[[Values], dict[Any, Any]]  # values of the inputs to new values of outputs


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


ATTENTION, SWAP = "attention", "swap"
WAYS = [("Swap the prompt", SWAP), ("Borrow attention", ATTENTION)]
READERS = {"amplify": read_factors, "blend": read_blend}
BLEND = ("Local blend", "two words, red blue; or none")
BORROWED: dict[type[Control], dict[str, tuple[str, str]]] = {
    PromptToPrompt: {
        "cross_replace": ("Cross replacement", "more keeps the layout"),
        "self_replace": ("Self replacement", "more keeps the shapes"),
        "amplify": ("Word weights", f"of new words, or star=3 red=0; else {PromptToPrompt.amplify:g}"),
        "blend": BLEND,
    },
    Injection: {
        "inject": ("Shared steps", "more keeps more of the picture"),
        "blocks_from": ("From block", "0 is the first, 1 the last"),
        "blocks_to": ("To block", "0 is the first, 1 the last"),
        "blend": BLEND,
    },
}
"""What a page lets its users set of a control: labels and hints. A network has one of the two."""


@dataclass(frozen=True)
class Controls:
    """All that says how to edit a picture, but for the picture; `borrowed` are the fields of a `control`."""

    source: gr.Textbox
    target: gr.Textbox
    way: gr.Radio
    guidance_scale: gr.Slider
    tau: gr.Slider
    swap_tau: gr.Slider
    control: type[Control]
    borrowed: Mapping[str, Component]
    button: gr.Button

    @classmethod
    def build(cls, pipe: InvertibleConsistencyPipeline, source: str, target: str) -> Controls:
        """On the page, at the family's own values; what only one way to edit has is hidden from the other."""
        usual, by_attention = usual_control(pipe.students), pipe.config.attention_control
        with gr.Row(elem_classes="prompts"):
            prompts = gr.Textbox(source, label="It shows"), gr.Textbox(target, label="It shall show")
            button = gr.Button("Edit", variant="primary", min_width=120, scale=0)
        with gr.Row():
            scales = {SWAP: pipe.config.guidance_scale, ATTENTION: pipe.config.edit_guidance_scale}
            way = gr.Radio(
                WAYS, value=ATTENTION if by_attention else SWAP, label="How", info="borrowing keeps more of the picture"
            )
            guidance = guidance_sliders(scales[way.value], pipe.config.tau)
            swap = gr.Slider(
                0, 1, pipe.config.tau, step=0.05, label="Swap tau", info="more changes the layout",
                visible=not by_attention,
            )  # fmt: skip
            guidance[1].input(None, guidance[1], swap, js="tau => tau", api_visibility="private")
        with gr.Row(visible=by_attention) as row:
            borrowed = {
                name: gr.Textbox(label=label, info=info)
                if name in READERS
                else gr.Slider(0, 1, getattr(usual, name), step=0.05, label=label, info=info)
                for name, (label, info) in BORROWED[type(usual)].items()
            }
        way.input(
            lambda chosen: (gr.Row(visible=chosen == ATTENTION), gr.Slider(visible=chosen == SWAP), scales[chosen]),
            way,
            [row, swap, guidance[0]],
            queue=False,
            api_visibility="private",
        )
        return cls(*prompts, way, *guidance, swap, type(usual), borrowed, button)

    @property
    def numbers(self) -> dict[str, Component]:
        named = {"guidance_scale": self.guidance_scale, "tau": self.tau, "swap_tau": self.swap_tau}
        return named | {name: one for name, one in self.borrowed.items() if name not in READERS}

    @property
    def texts(self) -> dict[str, Component]:
        return {name: one for name, one in self.borrowed.items() if name in READERS}

    @property
    def inputs(self) -> set:
        return {self.source, self.target, self.way, *self.numbers.values(), *self.texts.values()}

    @property
    def asking(self) -> list:
        """The events that ask for an edit: the button, Enter, a slider let go of."""
        texts = (self.source, self.target, *self.texts.values())
        return [self.button.click, *(one.submit for one in texts), *(one.release for one in self.numbers.values())]

    def wish(self, values: Values) -> Wish:
        """What is asked for; ValueError for what no edit has."""
        numbers = {name: read_number(values[one], name) for name, one in self.numbers.items()}
        guidance, swap = (numbers.pop("guidance_scale"), numbers.pop("tau")), numbers.pop("swap_tau")
        prompts = str(values[self.source] or "").strip(), str(values[self.target] or "").strip()
        if values[self.way] != ATTENTION:
            return Wish(
                *prompts, *guidance, swap_tau=None if swap == guidance[1] else swap
            )  # a sheet's follows its tau
        texts = {name: str(values[one] or "").strip() for name, one in self.texts.items()}
        told = {name: READERS[name](text) for name, text in texts.items() if text}
        return Wish(*prompts, *guidance, self.control(**numbers, **told))
