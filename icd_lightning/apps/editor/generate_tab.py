"""Generation: pictures of a prompt."""

from __future__ import annotations

from typing import Any

import gradio as gr

from icd_lightning.apps.editor.desk import Desk, Values, guidance_sliders, read_number
from icd_lightning.apps.editor.engine import MAX_PICTURES


class GenerateTab:
    """The tab's components and its one event."""

    def __init__(self, desk: Desk, prompt: str) -> None:
        self.editor, config = desk.editor, desk.editor.pipe.config
        with gr.Row(elem_classes="prompts"):
            self.prompt = gr.Textbox(prompt, label="It shall show")
            button = gr.Button("Generate", variant="primary", min_width=120, scale=0)
        with gr.Row():
            guidance = guidance_sliders(config.guidance_scale, config.tau)
            count = gr.Slider(1, MAX_PICTURES, 4, step=1, label="Pictures")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        self.numbers = dict(zip(("guidance_scale", "tau", "count", "seed"), (*guidance, count, seed), strict=True))
        self.pictures = gr.Gallery(
            label="Pictures", columns=4, format="png", interactive=False, elem_classes="large tiles"
        )
        self.cost = gr.HTML(elem_classes="cost")
        inputs = {self.prompt, *self.numbers.values()}
        asking = [button.click, self.prompt.submit]
        gr.on(asking, **desk.call(self.generate, inputs, (self.pictures, self.cost), name="generate"))

    def generate(self, values: Values) -> dict[Any, Any]:
        numbers = {name: read_number(values[slider], name) for name, slider in self.numbers.items()}
        count, seed = int(numbers.pop("count")), int(numbers.pop("seed"))
        pictures, cost = self.editor.generate(str(values[self.prompt] or "").strip(), count, seed, numbers)
        return {self.pictures: pictures, self.cost: cost.of_many()}
