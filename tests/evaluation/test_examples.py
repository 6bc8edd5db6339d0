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
    stack,
)
from icd_lightning.texts import csv_rows
from icd_lightning.tiny.benchmarks import scene_edits, scene_examples
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
    first, second = read_pie_bench(folder).examples
    assert (first.key, first.kind, first.blended_words, first.runs) == ("000", "random", False, ())
    assert (second.caption, second.target) == ("a cat on a wooden bench", "a dog on a wooden bench")
    assert (second.kind, second.blended_words) == ("change object", ("cat", "dog"))
    assert stack([first, second], 64).shape == (2, 3, 64, 64)
    assert [example.key for example in read_pie_bench(folder, natural=True).examples] == ["000"]


@pytest.mark.parametrize(
    ("changes", "words", "warning"),
    [
        ({"mask": [512 * 512 - 100, 101]}, ("cat", "dog"), "the mask leaves the picture and is cut there"),
        ({"blended_word": "cat dog bench"}, ("cat", "dog"), "blended by the first two"),
        ({"blended_word": "cat"}, False, "without a blend by the words 'cat': they are not two"),
        ({"blended_word": "cow dog"}, False, "'cow' is no word of the prompt"),
    ],
)
def test_what_its_authors_read_is_read_and_named(pie_bench, caplog, changes, words, warning):
    (example,) = read_pie_bench(pie_bench({"7": entry("7.jpg", **changes)})).examples
    assert example.blended_words == words
    assert warning in caplog.text
    assert "entry '7'" in caplog.text
    assert example.editable(512).shape == (1, 512, 512)


def test_an_entry_of_no_type_is_left_out(pie_bench, caplog):
    folder = pie_bench({"1": entry("1.jpg"), "2": entry("2.jpg", editing_type_id="12")})
    assert [example.key for example in read_pie_bench(folder).examples] == ["1"]
    assert "entry '2': left out, there is no type '12'" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "5 3"},
        {"mask": [3]},
        {"mask": [1.5, 2]},
        {"mask": [1] * (512 * 512 + 2)},
        {"original_prompt": None},
        {"blended_word": 7},
        {"image_path": "../x.jpg"},
        {"image_path": "/x.jpg"},
    ],
)
def test_a_broken_entry_is_named(pie_bench, changes):
    with pytest.raises(ValueError, match="entry '1' is not as PIE-Bench's are"):
        read_pie_bench(pie_bench({"1": entry("1.jpg", **changes)}))


def test_a_mask_is_runs_over_rows_and_the_border():
    mask = decode_mask([8 * 2 + 3, 2, 8 * 4 + 6, 3, 8 * 6 + 5, 100], 8)
    inside = {(2, 3), (2, 4), (4, 6), (6, 5), (6, 6)}  # the second and third go on in the next row, on the border
    border = {(r, c) for r in range(8) for c in range(8) if r in (0, 7) or c in (0, 7)}
    assert {(int(r), int(c)) for r, c in np.argwhere(mask)} == inside | border


def test_a_mask_is_resized_with_its_picture():
    mask = Example("a", "", runs=tuple(x for row in range(256) for x in (512 * row, 256))).editable(64)
    expected = torch.zeros(64, 64)
    expected[:32, :32] = 1  # the border is one pixel of 512, and lost but for the first row and column
    expected[0] = expected[:, 0] = 1
    assert torch.equal(mask, expected[None])


# Captions and edits


def test_coco_gives_each_pictures_first_caption(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "val" / name)
    notes = [(12, 7, "second"), (11, 7, " first "), (13, 3, "only")]
    content = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
        "annotations": [{"id": i, "image_id": image, "caption": caption} for i, image, caption in notes],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    examples = read_captions(tmp_path / "captions.json", tmp_path / "val").examples
    assert [(e.key, e.caption) for e in examples] == [("a.png", "only"), ("b.png", "first")]
    assert examples[0].array(32).shape == (32, 32, 3)


def test_pictures_that_cannot_be_read_are_told_of_before_any_work(tmp_path, pie_bench):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    for name, cut in (("b", 500), ("c", 0)):
        (tmp_path / f"{name}.png").write_bytes((tmp_path / f"{name}.png").read_bytes()[:cut])
    (tmp_path / "captions.csv").write_text("image,caption\na.png,a cat\nb.png,a dog\nc.png,a cow\n")
    (tmp_path / "edits.csv").write_text("image,source,target\na.png,cat,dog\nb.png,dog,cat\nb.png,dog,cow\n")
    with pytest.raises(ValueError, match=r"captions.csv names 2 of 3 pictures .* such as .*b.png cannot be read .*: c"):
        read_captions(tmp_path / "captions.csv")
    with pytest.raises(ValueError, match=r"edits.csv names 1 of 2 pictures that cannot be used, such as .*b.png"):
        read_coco_edits(tmp_path / "edits.csv")
    assert len(read_captions(tmp_path / "captions.csv", count=1).examples) == 1  # the others are not asked for
    (pie_bench({"1": entry("1.jpg")}) / "annotation_images" / "1.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mapping_file.json names 1 of 1 pictures .*/1.jpg"):
        read_pie_bench(tmp_path)


def test_a_csv_of_captions_needs_no_pictures(tmp_path):
    (tmp_path / "prompts.csv").write_text('caption\n"a cat, on a bench"\na dog\n')
    examples = read_captions(tmp_path / "prompts.csv").examples
    assert [e.caption for e in examples] == ["a cat, on a bench", "a dog"]
    with pytest.raises(ValueError, match="caption-00000 is a caption without a picture"):
        examples[0].array(64)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "image,text\na.png,x\n", "no column caption, only image, text"),
        ("x.csv", "image,caption\na.png,a cat, on a bench\n", "row 1 has more cells than the heading: quote a cell"),
        ("x.csv", "image,caption\na.png,a \x1b[2J cat\n", r"row 1: caption holds '\\x1b'"),
        ("x.csv", "image,caption\na.png," + "a" * 10_001 + "\n", "row 1: caption has 10,001 characters"),
        ("x.csv", "image,caption\na.png,\n", "row 1: caption is empty"),
        ("x.csv", "image,caption\nmissing.png,x\n", "names .*missing.png, which is not there"),
        ("x.csv", "image,caption\na.png,x\na.png,y\n", "'a.png' comes 2 times"),
        ("x.csv", "image,caption\n", "has no rows"),
        ("x.json", "{", "is no JSON"),
        ("x.json", "[]", "not a JSON object"),
        ("x.json", "{}", "not as COCO's caption annotations"),
        ("y.csv", "", "there is no .*y.csv"),
    ],
)
def test_broken_captions_are_refused(tmp_path, name, content, message):
    picture(tmp_path / "a.png")
    (tmp_path / name.replace("y", "x")).write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        read_captions(tmp_path / name)


EDITS_CSV = """,Unnamed: 0,file_name,old_caption,edited_caption,blended_words
0,0,a.png,a small cat on a bench.,a small dog on a bench. ,"('cat', 'dog')"
1,1,a.png,A CAT ON A RED BENCH.,A CAT ON A BLUE BENCH.,"('BENCH.', 'BENCH.')"
2,2,a.png,a cat,a cow,
"""


def test_pictures_are_looked_at_once_however_often_they_are_measured(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "edits.csv").write_text("image,caption\na.png,a star\n")
    looked = []
    monkeypatch.setattr("icd_lightning.evaluation.examples.read_picture", looked.append)
    for _ in range(3):
        read_captions(tmp_path / "edits.csv")
    assert looked == [tmp_path / "a.png"]


def test_the_references_table_of_edits_is_read(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "edits.csv").write_text(EDITS_CSV)
    first, second, third = read_coco_edits(tmp_path / "edits.csv").examples
    assert (first.target, first.blended_words) == ("a small dog on a bench.", ("cat", "dog"))
    assert second.blended_words == ("BENCH.", "BENCH.")
    assert third.blended_words is False  # an empty cell: no blend
    assert len({first.key, second.key, third.key}) == 3
    (tmp_path / "ours.csv").write_text("image,source,target,output\na.png,a cat,a cow,b.png\n")
    (ours,) = read_coco_edits(tmp_path / "ours.csv").examples
    assert (ours.target, ours.blended_words) == ("a cow", None)  # nobody says
    assert csv_rows(tmp_path / "ours.csv", ("image",)) == [
        {"image": "a.png", "source": "a cat", "target": "a cow", "output": "b.png"}
    ]
    (tmp_path / "none.csv").write_text("picture,source,target\na.png,a cat,a cow\n")
    with pytest.raises(ValueError, match=r"no column image \(or file_name\), only picture"):
        read_coco_edits(tmp_path / "none.csv")


# Scenes


def test_scene_edits_take_turns_and_each_differs_from_its_scene_where_it_says():
    examples = scene_edits(24, HELD_OUT_SEED)
    assert Counter(example.kind for example in examples) == dict.fromkeys(EDITS, 3)
    for example in examples:
        changed = (example.picture.draw() != example.truth.draw()).any(-1)
        assert np.array_equal(example.editable(64)[0].numpy(), changed)
        assert changed.any()
        assert example.caption != example.target
    assert scene_edits(9, HELD_OUT_SEED) == examples[:9]


def test_a_seed_depends_on_the_key_alone_or_is_a_number():
    first, second = scene_examples(2, HELD_OUT_SEED)
    assert first.seed(0) == Example(first.key, "other").seed(0)
    assert len({first.seed(0), first.seed(1), second.seed(0)}) == 3
    assert 0 <= first.seed(0) < 2**63
    assert Example("a", "", number=7).seed(3) == 7


def test_examples_are_told_apart_by_all_that_they_are(tmp_path):
    picture(tmp_path / "a.png")
    one = Example("a", "a cat", tmp_path / "a.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "b" / "a.png")
    moved = Example("a", "a cat", tmp_path / "b" / "a.png")
    picture(tmp_path / "a.png")
    assert one.identity == moved.identity  # a folder may be moved
    picture(tmp_path / "b" / "a.png", (64, 96))
    others = [Example("a", "a cat", tmp_path / "b" / "a.png"), Example("a", "a dog", tmp_path / "a.png")]
    assert len({one.identity, *(other.identity for other in others)}) == 3
