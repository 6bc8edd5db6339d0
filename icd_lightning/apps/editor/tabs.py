"""The page's tabs. Editing: a picture, what comes back of it, and the edit; examples; a sheet of many settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from icd_lightning.apps.editor.controls import Controls, Desk, Values, guidance_sliders, read_number, read_upload, shown
from icd_lightning.apps.editor.engine import MAX_PICTURES, Example, Inversion, Wish

TAUS = [0.2, 0.4, 0.6, 0.8, 1]
SHARES = (1 / 3, 2 / 3, 1.0, 5 / 3)  # of the family's own w: what a sheet offers


class EditTab:
    """The tab's components and events; it opens with the first example, edited."""

    def __init__(self, desk: Desk, examples: Sequence[Example]) -> None:
        self.desk, self.editor, self.examples = desk, desk.editor, examples
        first = examples[0] if examples else Example(None, "", "")
        before: tuple = (None,) * 4
        if examples:
            wish = self.editor.usual(first.source, first.target)
            before = self._shown(self.editor.invert(first.picture, first.source), wish)
        with gr.Row(elem_classes="pictures"):
            with gr.Column(min_width=0):
                self.picture = gr.Image(
                    first.picture, label="Original", type="filepath", format="png", sources="upload"
                )
                side = self.editor.pipe.resolution
                gr.HTML(f"Its centre, as {side} x {side} pixels", elem_classes="cost")
            self.results = (*_result("Reconstruction", *before[:2]), *_result("Edit", *before[2:]))
        self.controls = Controls.build(self.editor.pipe, first.source, first.target)
        self.inputs = {self.picture, *self.controls.inputs}
        gr.on(self.controls.asking, **desk.call(self.edit, self.inputs, self.results, name="edit"))
        self.picture.upload(**desk.call(self.opened, {self.picture}, ()))
        blank = f"() => Array({len(self.results)}).fill(null)"  # by the browser itself: a call would wait for others
        gr.on([self.picture.upload, self.picture.clear], None, None, self.results, js=blank, api_visibility="private")
        if examples:
            self._build_examples()
        self._build_sheet()

    def edit(self, values: Values) -> dict[Any, Any]:
        return dict(zip(self.results, self._shown(*self._asked(values)), strict=True))

    def opened(self, values: Values) -> dict[Any, Any]:
        read_upload(values[self.picture])
        return {}

    def sheet(self, values: Values) -> dict[Any, Any]:
        given = [(group.label, values[group] if isinstance(values[group], list) else ()) for group in self.grid]
        ticked = [sorted(read_number(one, label) for one in chosen) for label, chosen in given]
        picture, cost = self.editor.sheet(*self._asked(values), *ticked)
        return {self.sheet_picture: gr.Image(picture, visible=True), self.sheet_cost: cost.of_many()}

    def _asked(self, values: Values) -> tuple[Inversion, Wish]:
        wish = self.controls.wish(values)
        return self.editor.invert(read_upload(values[self.picture]), wish.source), wish

    def _shown(self, inversion: Inversion, wish: Wish) -> tuple[Image.Image, str, Image.Image, str]:
        edited, cost = self.editor.edit(inversion, wish)
        return inversion.reconstruction, f"To noise and back: {inversion.cost}", edited, f"From noise: {cost}"

    def _build_examples(self) -> None:
        pictures = [(one.picture, one.target) for one in self.examples]
        gallery = gr.Gallery(
            pictures, label="Examples", columns=len(pictures), allow_preview=False, interactive=False, format="png",
            buttons=[], object_fit="cover", elem_classes="tiles",
        )  # fmt: skip
        chosen = gallery.select(
            self._chosen, None, [self.picture, self.controls.source, self.controls.target],
            queue=False, api_visibility="private",
        )  # fmt: skip
        chosen.success(**self.desk.call(self.edit, self.inputs, self.results))

    def _chosen(self, event: gr.SelectData) -> Example:
        return self.examples[event.index]

    def _build_sheet(self) -> None:
        own = self.controls.guidance_scale.value
        scales = sorted({max(1, round(own * share)) for share in SHARES})
        with gr.Accordion("Contact sheet", open=False):
            with gr.Row():
                self.grid = (
                    gr.CheckboxGroup(TAUS, value=TAUS[::2], label="tau"),
                    gr.CheckboxGroup(scales, value=scales, label="Guidance w"),
                )
                draw = gr.Button("Draw", min_width=120, scale=0)
            self.sheet_picture, self.sheet_cost = shown("Every pair", visible=False), gr.HTML(elem_classes="cost")
        outputs = (self.sheet_picture, self.sheet_cost)
        draw.click(**self.desk.call(self.sheet, {*self.inputs, *self.grid}, outputs, name="sheet"))


def _result(label: str, value: Image.Image | None, cost: str | None) -> tuple[gr.Image, gr.HTML]:
    with gr.Column(min_width=0, elem_classes=label.lower()):
        return shown(label, value), gr.HTML(cost, elem_classes="cost")


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
