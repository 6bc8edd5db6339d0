"""What a user sets of an edit: components of Gradio, and the wish that their values are."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from icd_lightning.apps.editor.desk import Values, guidance_sliders, read_number
from icd_lightning.apps.editor.engine import Wish
from icd_lightning.editing.limits import PromptToPrompt, read_blend, read_factors
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

ATTENTION, SWAP = "attention", "swap"
WAYS = [("Swap the prompt", SWAP), ("Borrow attention", ATTENTION)]
NUMBERS = ("guidance_scale", "tau", "swap_tau", "cross_replace", "self_replace")
READERS = {"amplify": read_factors, "blend": read_blend}


@dataclass(frozen=True)
class Controls:
    """All that says how to edit a picture, but for the picture."""

    source: gr.Textbox
    target: gr.Textbox
    way: gr.Radio
    guidance_scale: gr.Slider
    tau: gr.Slider
    swap_tau: gr.Slider
    cross_replace: gr.Slider
    self_replace: gr.Slider
    amplify: gr.Textbox
    blend: gr.Textbox
    button: gr.Button

    @classmethod
    def build(cls, pipe: InvertibleConsistencyPipeline, source: str, target: str) -> Controls:
        """On the page, at the family's own values; what only one way to edit has is hidden from the other."""
        usual, by_attention = PromptToPrompt(), pipe.config.attention_control
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
            cross = gr.Slider(
                0, 1, usual.cross_replace, step=0.05, label="Cross replacement", info="more keeps the layout"
            )
            own = gr.Slider(0, 1, usual.self_replace, step=0.05, label="Self replacement", info="more keeps the shapes")
            amplify = gr.Textbox(label="Word weights", info=f"of new words, or star=3 red=0; else {usual.amplify:g}")
            blend = gr.Textbox(label="Local blend", info="two words, red blue; or none")
        way.input(
            lambda chosen: (gr.Row(visible=chosen == ATTENTION), gr.Slider(visible=chosen == SWAP), scales[chosen]),
            way,
            [row, swap, guidance[0]],
            queue=False,
            api_visibility="private",
        )
        return cls(*prompts, way, *guidance, swap, cross, own, amplify, blend, button)

    @property
    def inputs(self) -> set:
        """The components whose values say how."""
        return {component for name, component in vars(self).items() if name != "button"}

    @property
    def asking(self) -> list:
        """The events that ask for an edit: the button, Enter, a slider let go of."""
        texts = (self.source, self.target, self.amplify, self.blend)
        return [self.button.click, *(one.submit for one in texts), *(getattr(self, name).release for name in NUMBERS)]

    def wish(self, values: Values) -> Wish:
        """What is asked for; ValueError for what no edit has."""
        numbers = {name: read_number(values[getattr(self, name)], name) for name in NUMBERS}
        guidance, swap = (numbers.pop("guidance_scale"), numbers.pop("tau")), numbers.pop("swap_tau")
        prompts = str(values[self.source] or "").strip(), str(values[self.target] or "").strip()
        if values[self.way] != ATTENTION:
            return Wish(
                *prompts, *guidance, swap_tau=None if swap == guidance[1] else swap
            )  # a sheet's follows its tau
        texts = {name: str(values[getattr(self, name)] or "").strip() for name in READERS}
        told = {name: READERS[name](text) for name, text in texts.items() if text}
        return Wish(*prompts, *guidance, PromptToPrompt(**numbers, **told))
