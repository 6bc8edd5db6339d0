"""Readers of benchmarks on small folders made up for the purpose, good and bad; scenes whose edits are known."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from icd_lightning.evaluation.examples import (
    Example,
    decode_mask,
    read_captions,
    read_coco_edits,
    read_pie_bench,
    scene_edits,
    scene_examples,
    stack,
)
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import EDITS, HELD_OUT_SEED


def picture(path, size=(96, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)


# PIE-Bench


def entry(path, **changes):
    return {
        "image_path": path,
        "original_prompt": "a [cat] on a [wooden] bench",
        "editing_prompt": "a [dog] on a [wooden] bench",
        "editing_instruction": "turn the cat into a dog",
        "editing_type_id": "1",
        "blended_word": "cat dog",
        "mask": [512 * 10 + 5, 20],
        **changes,
    }


@pytest.fixture
def pie_bench(tmp_path):
    """Writes a folder as PIE-Bench's is, from entries by key."""

    def write(entries):
        for content in entries.values():
            picture(tmp_path / "annotation_images" / content["image_path"], (512, 512))
        (tmp_path / "mapping_file.json").write_text(json.dumps(entries))
        return tmp_path

    return write


def test_pie_bench_is_read_without_brackets_with_words_masks_and_types(pie_bench):
    folder = pie_bench(
        {
            "111": entry("1_change_object_80/1_artificial/1_animal/111.jpg"),
            "000": entry("0_random_140/000.jpg", editing_type_id="0", blended_word="", mask=[]),
        }
    )
    first, second = read_pie_bench(folder)
    assert (first.key, first.kind, first.blended_words, first.runs) == ("000", "random", False, ())
    assert (second.caption, second.target) == ("a cat on a wooden bench", "a dog on a wooden bench")
    assert (second.kind, second.blended_words) == ("change object", ("cat", "dog"))
    assert stack([first, second], 64).shape == (2, 3, 64, 64)
    assert [example.key for example in read_pie_bench(folder, natural=True)] == ["000"]


def test_a_mask_is_runs_over_rows_and_the_border():
    mask = decode_mask([8 * 2 + 3, 2, 8 * 4 + 6, 3], 8)
    inside = {(2, 3), (2, 4), (4, 6)}  # the second run goes on in the next row, on the border
    border = {(r, c) for r in range(8) for c in range(8) if r in (0, 7) or c in (0, 7)}
    assert {(int(r), int(c)) for r, c in np.argwhere(mask)} == inside | border


def test_a_mask_is_resized_with_its_picture():
    example = Example("a", "", None, "b", runs=tuple(x for row in range(256) for x in (512 * row, 256)))
    mask = example.editable(64)
    assert mask.shape == (1, 64, 64)
    expected = torch.zeros(64, 64)
    expected[:32, :32] = 1  # the border is one pixel of 512, and lost but for the first row and column
    expected[0] = expected[:, 0] = 1
    assert torch.equal(mask[0], expected)


@pytest.mark.parametrize(("runs", "message"), [([3], "pairs"), ([60, 10], "leaves the 8 x 8"), ([-1, 2], "leaves")])
def test_a_broken_mask_is_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(runs, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"editing_type_id": "12"}, "entry '1' is not as PIE-Bench's are"),
        ({"mask": "5 3"}, "entry '1' is not"),
        ({"original_prompt": None}, "entry '1' is not"),
        ({"blended_word": 7}, "entry '1' is not"),
    ],
)
def test_a_broken_entry_is_named(pie_bench, changes, message):
    with pytest.raises(ValueError, match=message):
        read_pie_bench(pie_bench({"1": entry("1.jpg", **changes)}))


@pytest.mark.parametrize(
    ("words", "reason"), [("cat", "they are not two"), ("cat wolf", "'wolf' is no word of the prompt 'a dog on")]
)
def test_an_edit_goes_on_without_a_blend_by_words_that_are_not_there(pie_bench, caplog, words, reason):
    (example,) = read_pie_bench(pie_bench({"1": entry("1.jpg", blended_word=words)}))
    assert example.blended_words is False
    assert f", 1: edited without a blend by the words '{words}': {reason}" in caplog.text


def test_another_folder_is_not_pie_bench(tmp_path):
    with pytest.raises(ValueError, match="is not PIE-Bench: there is no"):
        read_pie_bench(tmp_path)


# Captions


def test_coco_gives_each_picture_its_first_caption(tmp_path):
    for name in ("b.png", "a.png"):
        picture(tmp_path / "val" / name)
    (tmp_path / "captions.json").write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
                "annotations": [
                    {"id": 12, "image_id": 7, "caption": "second"},
                    {"id": 11, "image_id": 7, "caption": " first "},
                    {"id": 13, "image_id": 3, "caption": "only"},
                ],
            }
        )
    )
    examples = read_captions(tmp_path / "captions.json", tmp_path / "val")
    assert [(e.key, e.caption) for e in examples] == [("a.png", "only"), ("b.png", "first")]
    assert examples[0].array(32).shape == (32, 32, 3)


def test_a_csv_of_captions_needs_no_pictures(tmp_path):
    (tmp_path / "prompts.csv").write_text('caption\n"a cat, on a bench"\na dog\n')
    examples = read_captions(tmp_path / "prompts.csv")
    assert [e.caption for e in examples] == ["a cat, on a bench", "a dog"]
    with pytest.raises(ValueError, match="caption-00000 is a caption without a picture"):
        examples[0].array(64)


def test_the_order_of_lines_changes_nothing(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    for file, lines in (("one.csv", ("a.png,x", "b.png,y")), ("two.csv", ("b.png,y", "a.png,x"))):
        (tmp_path / file).write_text("\n".join(("image,caption", *lines)))
    one, two = (read_captions(tmp_path / file) for file in ("one.csv", "two.csv"))
    assert one == two
    assert [e.seed(0) for e in one] == [e.seed(0) for e in two]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,text\na.png,x\n", "no column 'caption', only image, text"),
        ("image,caption\na.png,\n", "row 1: caption is empty"),
        ("image,caption\nmissing.png,x\n", "names .*missing.png, which is not there"),
        ("image,caption\na.png,x\na.png,y\n", "'a.png' comes 2 times"),
        ("image,caption\n", "holds no examples"),
        ("", "no column 'caption', only none"),
    ],
)
def test_a_broken_csv_is_refused(tmp_path, content, message):
    picture(tmp_path / "a.png")
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[]", "is not a JSON object"), ("{}", "not as COCO's caption annotations")],
)
def test_broken_annotations_are_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / "x.json")


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_captions(tmp_path / "x.csv")


def test_coco_edits_may_repeat_a_picture(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "edits.csv").write_text(
        'file_name,old_caption,edited_caption,blended_words\na.png,a cat,a dog,"cat,dog"\na.png,a cat,a cow,\n'
    )
    first, second = read_coco_edits(tmp_path / "edits.csv")
    assert (first.caption, first.target, first.blended_words) == ("a cat", "a dog", ("cat", "dog"))
    assert (second.target, second.blended_words) == ("a cow", None)
    assert first.key != second.key


# Scenes


def test_scene_edits_take_turns_and_each_differs_from_its_scene_where_it_says():
    examples = scene_edits(24, HELD_OUT_SEED)
    assert Counter(example.kind for example in examples) == dict.fromkeys(EDITS, 3)
    for example in examples:
        changed = (render(example.picture) != render(example.truth)).any(-1)
        assert np.array_equal(example.editable(64)[0].numpy(), changed)
        assert changed.any()
        assert example.caption != example.target


def test_more_scenes_begin_with_the_same_ones():
    assert scene_edits(24, 5)[:9] == scene_edits(9, 5)
    assert scene_examples(9, 5)[:4] == scene_examples(4, 5)


def test_a_seed_depends_on_the_key_alone():
    first, second = scene_examples(2, HELD_OUT_SEED)
    assert first.seed(0) == Example(first.key, "other").seed(0)
    assert len({first.seed(0), first.seed(1), second.seed(0)}) == 3
    assert 0 <= first.seed(0) < 2**63
