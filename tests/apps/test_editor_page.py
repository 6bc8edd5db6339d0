import inspect

import httpx
import pytest
from editor_case import TASKS, Visitor, fetched, same, serving
from PIL import Image

from icd_lightning.apps import editor as package
from icd_lightning.apps.editor.engine import MAX_PIXELS
from icd_lightning.editing.limits import Injection
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt

PICTURE, SOURCE, TARGET = TASKS[0]
BORROWED = (SOURCE, TARGET, "attention", 3, 1, 1)
SWAPPED = ("swap", 3, 1, 1, 0.3, 0.6, "", "")


@pytest.fixture
def visitor(page) -> Visitor:
    return Visitor(page)


def refusal(answer: dict) -> str:
    """The notice of a call that failed."""
    notice, *_ = answer["data"]
    assert notice["visible"]
    return notice["value"]


@pytest.mark.parametrize(
    ("way", "options"),
    [
        (("swap", 2, 0.8, 0.8, 0.3, 0.6, "9", "none"), {"guidance_scale": 2.0, "tau": 0.8}),
        (("swap", 2, 0.8, 0.4, 0.3, 0.6, "", ""), {"guidance_scale": 2.0, "tau": 0.8, "swap_tau": 0.4}),
        (
            ("attention", 3, 1, 1, 0.5, 0.25, "2", "none"),
            {"tau": 1.0, "control": PromptToPrompt(cross_replace=0.5, self_replace=0.25, amplify=2.0, blend=False)},
        ),
        (
            ("attention", 3, 1, 1, 0.5, 0.5, f"{TARGET.split()[2]}=3", f"{SOURCE.split()[2]} {TARGET.split()[2]}"),
            {
                "tau": 1.0,
                "control": PromptToPrompt(
                    cross_replace=0.5,
                    self_replace=0.5,
                    amplify={TARGET.split()[2]: 3.0},
                    blend=(SOURCE.split()[2], TARGET.split()[2]),
                ),
            },
        ),
        (("attention", 3, 1, 1, 0.3, 0.6, "", ""), {"tau": 1.0, "control": PromptToPrompt()}),
    ],
    ids=["swap", "swap_tau", "attention", "words", "defaults"],
)
def test_every_control_is_the_pipeline_s(visitor, pipeline, way, options):
    notice, back, back_cost, edited, cost = visitor.edit(PICTURE, SOURCE, TARGET, *way)
    expected = pipeline.edit(PICTURE, SOURCE, TARGET, **options).images[0]
    assert same(fetched(edited), expected)
    assert same(fetched(back), pipeline.reconstruct(PICTURE, SOURCE).images[0])
    assert not notice["visible"]
    assert back_cost.startswith("To noise and back: 8 evaluations, ")
    assert cost.startswith(f"From noise: {8 if 'control' in options else 4} evaluations, ")


def test_a_transformer_has_controls_of_its_own_and_no_others(flow_layouts):
    from icd_lightning.apps.editor.page import EditorPage

    pipe = InvertibleConsistencyPipeline.from_pretrained(str(flow_layouts["sd3"]))
    prompts = "red star", "star"
    with serving(EditorPage(pipe)) as page:
        visitor = Visitor(page)
        _, _, _, edited, _ = visitor.edit(PICTURE, *prompts, "attention", 3, 1, 1, 0.5, 0.25, 0.75, "none")
        edited = fetched(edited)
        wrong = visitor.call("edit", visitor.upload(PICTURE), *prompts, "attention", 3, 1, 1, 0.5, 0.75, 0.25, "none")
        labels = {one["props"].get("label") for one in page.config["components"]}
    control = Injection(inject=0.5, blocks_from=0.25, blocks_to=0.75, blend=False)
    options = {"guidance_scale": 3.0, "tau": 1.0, "control": control}
    assert same(edited, pipe.edit(PICTURE, *prompts, **options).images[0])
    assert "blocks_from 0.75 must be less than blocks_to 0.25" in refusal(wrong)
    assert {"Shared steps", "From block", "To block", "Local blend"} <= labels
    assert not {"Cross replacement", "Self replacement", "Word weights"} & labels
    assert page.editor.invert(PICTURE, "star " * 30).cost.nfe == 8  # more than CLIP reads; T5 reads on
    with pytest.raises(ValueError, match=r"the source prompt has \d+ tokens, and the model reads 255: shorten it"):
        page.editor.invert(PICTURE, "star " * 60)


@pytest.mark.slow
def test_a_sheet_is_of_what_is_ticked_in_its_order(visitor, page):
    values = (visitor.upload(PICTURE), SOURCE, TARGET, *SWAPPED, [1, 0.4], [5, 1])
    _, sheet, cost = visitor.call("sheet", *values)["data"]
    editor = page.editor
    expected, _ = editor.sheet(editor.invert(PICTURE, SOURCE), editor.usual(SOURCE, TARGET), [0.4, 1], [1, 5])
    assert same(fetched(sheet["value"]), expected)
    assert cost.startswith("4 evaluations each, ")


def test_pictures_are_generated_of_the_seeds_asked_for(visitor, pipeline):
    _, pictures, cost = visitor.call("generate", TARGET, 2, 0.8, 3, 11)["data"]
    expected = pipeline.generate(TARGET, num_images_per_prompt=3, seed=11, guidance_scale=2.0, tau=0.8).images
    assert all(same(fetched(one["image"]), other) for one, other in zip(pictures, expected, strict=True))
    assert cost.startswith("4 evaluations each, ")


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((SOURCE, "", *SWAPPED), "the target prompt is empty: say what the picture shall show"),
        ((SOURCE, "a <b>cat</b>", *SWAPPED), "this model does not know &lt;b&gt;cat&lt;/b&gt;: write with a, above"),
        ((SOURCE, TARGET, "swap", 0, 1, 1, 0, 0, "", ""), "guidance_scale 0 must be 1 (unguided) or more, and finite"),
        ((SOURCE, TARGET, "swap", 3, 2, 1, 0, 0, "", ""), "tau 2 is no fraction: choose between 0 and 1"),
        ((SOURCE, TARGET, "swap", None, 1, 1, 0, 0, "", ""), "guidance_scale None must be a finite number"),
        ((SOURCE, TARGET, "swap", "3", 1, 1, 0, 0, "", ""), "guidance_scale &#39;3&#39; must be a finite number"),
        (
            (*BORROWED, 7, 0, "", ""),
            "cross_replace 7 is no fraction: choose between 0 and 1",
        ),
        ((*BORROWED, 0, 0, "x", ""), "amplify &#39;x&#39; must be a number, or words with"),
        (
            (*BORROWED, 0, 0, "", "a b c"),
            "blend &#39;a b c&#39; must be a word of the source",
        ),
    ],
)
def test_a_mistake_is_told_and_nothing_is_made(visitor, values, message):
    answer = visitor.call("edit", visitor.upload(PICTURE), *values)
    assert refusal(answer).startswith(f'<p role="alert">{message}')
    assert "Traceback" not in str(answer)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"no picture", "a.png", "a.png cannot be read as a picture"),
        (Image.new("1", (8000, MAX_PIXELS // 8000 + 1)), "b.png", "b.png has more than 40 million pixels: make it"),
        (Image.new("RGB", (510, 10)), "c.png", "c.png, 510 x 10 pixels, is too narrow"),
    ],
)
def test_a_file_that_is_no_good_picture_is_refused_by_its_name_alone(visitor, content, name, message):
    told = refusal(visitor.call("edit", visitor.upload(content, name), SOURCE, TARGET, *SWAPPED))
    assert message in told
    assert "/" not in told.removesuffix("</p>")


@pytest.mark.parametrize("file", [None, {}, {"path": None, "meta": {"_type": "gradio.FileData"}}])
def test_no_picture_is_told(visitor, file):
    told = refusal(visitor.call("edit", file, SOURCE, TARGET, *SWAPPED))
    assert "there is no picture: upload one, or choose an example" in told


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("edit", ()),
        ("edit", ("text", SOURCE, TARGET, *SWAPPED)),
        ("edit", ({"path": 5, "meta": {"_type": "gradio.FileData"}}, SOURCE, TARGET, *SWAPPED)),
        ("edit", ({"path": "a\0b", "meta": {"_type": "gradio.FileData"}}, SOURCE, TARGET, *SWAPPED)),
        ("generate", (TARGET, 10**400, 1, 1, 0)),
        ("sheet", (None, SOURCE, TARGET, *SWAPPED, 5, {})),
    ],
    ids=["nothing", "a text", "a number", "a zero byte", "a large number", "no lists"],
)
def test_a_call_that_no_page_makes_leaves_no_traceback(visitor, capfd, name, values):
    assert "reload it" in str(answer := visitor.call(name, *values)) or refusal(answer)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_file_that_is_too_large_is_refused_as_it_comes(page):
    from icd_lightning.apps.editor.page import MAX_BYTES

    answer = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": bytes(MAX_BYTES + 1)}, timeout=60)
    assert answer.status_code == 413
    assert f"maximum allowed size of {MAX_BYTES} bytes" in answer.text


@pytest.mark.parametrize("mark", [{}, {"meta": {"_type": "other"}}, {"meta": {"_type": "gradio.FileData"}}])
def test_a_file_of_the_server_is_not_read(visitor, tmp_path, mark):
    """Gradio itself asks only of what is marked as a file whether it was uploaded."""
    PICTURE.save(tmp_path / "secret.png")
    answer = visitor.call("edit", {"path": str(tmp_path / "secret.png"), **mark}, SOURCE, TARGET, *SWAPPED)
    assert "data" not in answer
    assert "Traceback" not in str(answer)


@pytest.mark.parametrize("nest", [lambda file: file, lambda file: {"path": None, "url": [file]}], ids=["flat", "deep"])
def test_an_address_is_not_fetched(visitor, hosts, nest):
    file = {"path": "HTTPS://picture.invalid/a.png", "meta": {"_type": "gradio.FileData"}}
    answer = visitor.call("edit", nest(file), SOURCE, TARGET, *SWAPPED)
    assert "neither addresses nor the server's files are read" in answer["error"]
    assert "picture.invalid" not in hosts


# The page


def test_nobody_outside_is_asked_for_anything(visitor, hosts):
    assert "data" in visitor.call("edit", visitor.upload(PICTURE), SOURCE, TARGET, *SWAPPED)
    assert hosts, "this machine itself is"
    assert set(hosts) <= {None, "127.0.0.1", "localhost"}


def test_a_space_s_app_is_what_the_package_says(monkeypatch):
    from icd_lightning.apps.editor.page import EditorPage

    built = []
    monkeypatch.setattr(EditorPage, "launch", lambda self: built.append(self))
    code = inspect.cleandoc(package.__doc__.split("\n\n", 1)[1])
    exec(code, {})
    assert len(code.splitlines()) == 3
    assert isinstance(built[0], EditorPage)


def test_a_model_without_examples_opens_empty(random_family):
    from icd_lightning.apps.editor.page import EditorPage

    config = EditorPage(InvertibleConsistencyPipeline.from_pretrained(str(random_family))).config
    props = {one["props"].get("label"): one["props"] for one in config["components"]}
    assert "Examples" not in props
    assert not any(props[label].get("value") for label in ("Original", "Edit", "It shows", "Prompt") if label in props)
