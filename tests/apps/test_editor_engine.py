from dataclasses import replace

import pytest
from editor_case import TASKS, evaluations, same
from families_case import write_configs

from icd_lightning.apps.editor.engine import Editor, Wish
from icd_lightning.editing.limits import PromptToPrompt
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.evaluation.report.sheet import contact_sheet
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import write_diffusers
from icd_lightning.models.students import DIRECTIONS, LoraStudents

PICTURE, SOURCE, TARGET = TASKS[0]
WISH = Wish(SOURCE, TARGET, 2.0, 0.7)
CONTROL = PromptToPrompt(cross_replace=0.5, self_replace=0.25, amplify=2.0)


@pytest.fixture
def editor(pipeline) -> Editor:
    return Editor(pipeline, kept=2)


@pytest.mark.parametrize(("control", "nfe"), [(None, 4), (CONTROL, 8)], ids=["swap", "attention"])
def test_an_edit_is_the_pipeline_s_own(editor, pipeline, control, nfe):
    inversion = editor.invert(PICTURE, SOURCE)
    edited, cost = editor.edit(inversion, replace(WISH, control=control))
    expected = pipeline.edit(PICTURE, SOURCE, TARGET, guidance_scale=2.0, tau=0.7, control=control).images[0]
    assert same(edited, expected)
    assert same(inversion.reconstruction, pipeline.reconstruct(PICTURE, SOURCE).images[0])
    assert not same(edited, inversion.reconstruction)
    assert (inversion.cost.nfe, cost.nfe) == (8, nfe)
    assert cost.seconds > 0


def test_another_edit_of_a_picture_only_decodes(editor):
    editor.invert(PICTURE, SOURCE)
    with evaluations() as rows:
        _, cost = editor.edit(editor.invert(PICTURE.copy(), SOURCE), replace(WISH, tau=0.4))
    assert rows == [1] * 4
    assert cost.nfe == 4


def test_what_is_kept_is_of_this_picture_and_this_prompt(editor, pipeline):
    for picture, prompt in [(PICTURE, SOURCE), (TASKS[1].picture, SOURCE), (PICTURE, TARGET)]:
        assert same(editor.invert(picture, prompt).reconstruction, pipeline.reconstruct(picture, prompt).images[0])
    with evaluations() as rows:
        editor.invert(TASKS[1].picture, SOURCE)
        editor.invert(PICTURE, TARGET)
    assert rows == [], "the latest two are kept"
    with evaluations() as rows:
        editor.invert(PICTURE, SOURCE)
    assert rows == [1] * 8, "the third latest is not"


def test_a_sheet_is_of_the_very_edits(editor):
    inversion, taus, scales = editor.invert(PICTURE, SOURCE), [0.4, 1], [1, 3]
    wishes = [replace(WISH, tau=tau, guidance_scale=scale) for scale in scales for tau in taus]
    cells = [editor.edit(inversion, wish)[0] for wish in wishes]
    with evaluations() as rows:
        sheet, cost = editor.sheet(inversion, WISH, taus, scales)
    assert rows == [1] * 16
    assert cost.nfe == 4
    grid = {"tau": taus, "guidance_scale": scales}
    assert same(sheet, contact_sheet(PICTURE, (SOURCE, TARGET), grid, cells))


@pytest.mark.parametrize(("taus", "scales"), [([], [3]), ([1], []), ([1] * 7, [3] * 6)])
def test_a_sheet_of_no_or_too_many_cells_is_refused(editor, taus, scales):
    with pytest.raises(ValueError, match=r"make no sheet: choose at least one of each, and at most 36 pairs"):
        editor.sheet(editor.invert(PICTURE, SOURCE), WISH, taus, scales)


def test_generation_is_the_pipeline_s_own(editor, pipeline):
    pictures, cost = editor.generate(TARGET, 2, 5, {"guidance_scale": 2.0, "tau": 0.8})
    expected = pipeline.generate(TARGET, num_images_per_prompt=2, seed=5, guidance_scale=2.0, tau=0.8).images
    assert all(map(same, pictures, expected))
    assert cost.nfe == 4
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"{count} pictures are not made at once: ask for 1 to 8"):
            editor.generate(TARGET, count, 5, {})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the source prompt is empty: say what the picture shows"),
        (" \n", "the source prompt is empty"),
        ("a red star " * 9, "the source prompt has 27 tokens, and the model reads 22: shorten it"),
        ("a" * 2001, "the source prompt has 2001 characters: shorten it to 2000 or fewer"),
        ("a \ud800", r"prompt 'a \\ud800' holds '\\ud800'; is it UTF-8\?"),
        ("a cat and a star", "this model does not know cat, and: write with a, above, an, background, blue, "),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(editor, prompt, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        editor.invert(PICTURE, prompt)
    with pytest.raises(ValueError, match=f"^{message.replace('source', 'target').replace('shows', 'shall show')}"):
        editor.edit(editor.invert(PICTURE, SOURCE), replace(WISH, target=prompt))


def test_prompts_of_the_words_that_are_named_are_taken(editor):
    for start in range(0, len(editor.words), 20):
        assert editor.invert(PICTURE, " ".join(editor.words[start : start + 20])).cost.nfe == 8


@pytest.mark.parametrize(("name", "nfe"), [("sd15", 8), pytest.param("sdxl", 4, marks=pytest.mark.slow)])
def test_any_family_is_edited_in_its_own_way(tmp_path, name, nfe):
    model = f"random:{write_configs(name, tmp_path / name)}"
    students = LoraStudents(Family(model).load_model(guided=True))
    for direction in DIRECTIONS:
        write_diffusers(students.file(direction, {"boundaries": [0, 259, 519, 779, 999]}), tmp_path / direction)
    paths = {direction: str(tmp_path / direction) for direction in DIRECTIONS}
    pipe = InvertibleConsistencyPipeline.from_pretrained(model, **paths)
    editor, prompts = Editor(pipe), ("a cat on a bench", "a dog on a bench")
    edited, cost = editor.edit(editor.invert(PICTURE, prompts[0]), editor.usual(*prompts))
    assert cost.nfe == nfe
    assert same(edited, pipe.edit(PICTURE, *prompts).images[0])
