"""The web editor's page, by Gradio."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import escape

from icd_lightning.apps.editor.controls import Desk
from icd_lightning.apps.editor.engine import Editor, examples_of
from icd_lightning.apps.editor.tabs import EditTab, GenerateTab
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline

MAX_BYTES = 20_000_000  # of a picture's file
MAX_WAITING = 64  # calls in the queue; who comes later is told that it is full
KEPT_SECONDS = 3600  # for which pictures stay on the disk
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
FILE = {"_type": "gradio.FileData"}  # the mark of a file among a call's inputs


class EditorPage(gr.Blocks):
    """A page on which everybody edits by one pipeline; `launch` serves it.

    Calls wait for one another in one queue, for the pipeline can do one thing at a time.
    """

    def __init__(self, pipe: InvertibleConsistencyPipeline) -> None:
        super().__init__(title="icd_lightning", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS))
        self.editor, examples = Editor(pipe), examples_of(pipe.config._name_or_path)
        with self:
            gr.HTML(_heading(self.editor), elem_classes="heading")
            desk = Desk(self.editor, gr.HTML(visible=False, elem_classes="notice"))
            with gr.Tab("Edit"):
                EditTab(desk, examples)
            with gr.Tab("Generate"):
                GenerateTab(desk, examples[0].source if examples else "")
        self.queue(max_size=MAX_WAITING, api_open=False)

    def launch(self, **options: Any) -> Any:
        """Serve the page, by default on this machine alone; options are Gradio's."""
        off = dict.fromkeys(("share", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"), False)
        theme = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=("monospace",))
        theme.set(button_primary_background_fill="*primary_600", slider_color="*primary_600")
        theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
        look = {"theme": theme, "css_paths": Path(__file__).with_name("style.css"), "footer_links": [], "quiet": True}
        return super().launch(**{"max_file_size": MAX_BYTES, **off, **look, **options})

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any) -> list[Any]:
        """As Gradio does, and no file is taken that was not uploaded; calls that no page makes write no traceback.

        Gradio fetches a path that is an address, and checks those paths alone that are marked as files.
        """
        for file in _files(inputs):
            if file.get("meta") != FILE or "://" in str(file["path"]):
                raise gr.Error("neither addresses nor the server's files are read: upload it", print_exception=False)
        try:
            return await super().preprocess_data(block_fn, inputs, *rest)
        except (ValueError, TypeError) as error:
            raise gr.Error("the page makes no such call: reload it", print_exception=False) from error


def _files(value: Any) -> Iterator[dict[str, Any]]:
    """All that could be taken for a file, however deep."""
    if isinstance(value, dict) and "path" in value:
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _files(one)


def _heading(editor: Editor) -> str:
    model, steps = Path(editor.pipe.config._name_or_path).name, editor.pipe.boundaries.num_segments
    text = f"{model}: to noise in {steps} steps, and back in {steps} with another prompt."
    words = escape(", ".join(editor.words))
    known = f"<details><summary>The words it knows</summary>{words}</details>" if words else ""
    return f"<h1>Edit a picture by text</h1><p>{escape(text)}</p>{known}"
