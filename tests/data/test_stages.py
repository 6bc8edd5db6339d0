import math
from pathlib import Path

import pytest
from PIL import Image

from icd_lightning.data.curation.recipe import Recipe, read_recipe
from icd_lightning.data.curation.stages import (
    AspectRatio,
    CaptionWords,
    Field,
    LatinLetters,
    RepeatedWord,
    ShortSide,
)
from icd_lightning.data.decoding import Sample
from icd_lightning.metrics.stage import Metric

CONF = Path(__file__).parents[2] / "conf" / "data" / "curate"
SAFE = Field(fields=("NSFW",), words={"UNLIKELY": 0, "NSFW": 1}, most=0.5)


def sample(caption="a red star", size=(64, 96), **metadata) -> Sample:
    return Sample("one", "key", caption, metadata, size, Image.new("RGB", size[::-1]))


@pytest.mark.parametrize(
    ("stage", "kept", "dropped"),
    [
        (ShortSide(least=64), sample(size=(64, 96)), sample(size=(96, 63))),
        (AspectRatio(most=2), sample(size=(64, 128)), sample(size=(129, 64))),
        (CaptionWords(least=3, most=5), sample("a red star"), sample("star")),
        (LatinLetters(least=0.8), sample("a red star, two"), sample("IMG_20190803_1432.jpg")),
        (LatinLetters(least=0.8), sample("a red star"), sample("красная звезда")),
        (RepeatedWord(most=0.4), sample("a red star on a wall"), sample("shoes Shoes cheap shoes")),
        (Field(fields=("similarity",), least=0.3), sample(similarity=0.3), sample(similarity=0.29)),
        (Field(fields=("similarity",), least=0.3), sample(similarity="0.31"), sample()),
        (Field(fields=("a", "B"), most=1), sample(B=1), sample(a=2, B=0)),
        (Field(fields=("a",), least=0), sample(a=0), sample(a=math.nan)),
        (Field(fields=("a",), least=0), sample(a=0), sample(a=[1])),
        (SAFE, sample(NSFW="UNLIKELY"), sample(NSFW="NSFW")),
        (SAFE, sample(NSFW="UNLIKELY"), sample(NSFW="odd")),
        (Field(fields=("w",), missing=0, most=0.5), sample(), sample(w=0.6)),
    ],
)
def test_a_stage_keeps_what_lies_in_its_range(stage, kept, dropped):
    values = [math.nan if value is None else value for value in stage.values([kept, dropped])]
    assert list(map(stage.keeps, values)) == [True, False]


def test_a_metric_is_a_stage():
    from icd_lightning.tiny.rendering import render
    from icd_lightning.tiny.scenes import scene_at

    stage, scene = Metric(metric="tiny-agreement", side=64, least=0.7), scene_at(0, 0)
    picture = Image.fromarray(render(scene, 128))
    right = sample(scene.caption())._replace(picture=picture)
    wrong = sample("a small blue ring on a white dotted background")._replace(picture=picture)
    assert [stage.keeps(value) for value in stage.values([right, wrong])] == [True, False]


def test_a_metric_of_two_pictures_is_no_stage():
    with pytest.raises(ValueError, match=r"metric 'psnr' is not of one picture.*take clip-t"):
        Metric(metric="psnr", least=1).values([sample()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShortSide(), "ShortSide drops nothing: give least, most"),
        (lambda: ShortSide(least=math.nan), "ShortSide: least nan"),
        (lambda: ShortSide(least=5, most=4), "least not above most"),
        (lambda: ShortSide(least=5, reason="too small"), "reason 'too small' must consist"),
        (lambda: Field(least=1), "Field reads nothing: give fields"),
        (lambda: Metric(side=0, least=1), "side 0 must be at least 1"),
        (lambda: Recipe((ShortSide(least=1), ShortSide(least=2))), "two stages drop for 'short_side'"),
        (lambda: Recipe((ShortSide(least=1, reason="no_image"),)), "two stages drop for 'no_image'"),
        (lambda: Recipe(resolution=0), "resolution 0 must be at least 1"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must hold a list of stages"),
        ("stages: 3", "must hold a list of stages"),
        ("stages: [{class_path: pathlib.Path}]", "pathlib.Path is no Stage"),
        ("stages: [{class_path: icd_lightning.data.curation.stages.Short}]", "there is no class"),
        ("stages: [{init_args: {least: 1}}]", "class_path"),
        ("stages: [{class_path: icd_lightning.data.curation.stages.ShortSide, init_args: {last: 1}}]", "last"),
        ("duplicates: {radius: many}", "radius"),
        ("resolutions: 4", "resolutions"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)recipe\.yaml.*{message}"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["laion_sd15", "sdxl", "flow"])
def test_every_recipe_is_read_and_keeps_a_good_pair(name):
    recipe = read_recipe(CONF / f"{name}.yaml")
    about = {"similarity": 0.35, "aesthetic": 6, "pwatermark": 0.1, "NSFW": "UNLIKELY"}
    good = sample("a red star on the wall of a small house", (1024, 1536), **about)
    bad = sample("a red star on the wall of a small house", (1024, 1536), similarity=0.2, aesthetic=4)
    own = [stage for stage in recipe.stages if not isinstance(stage, Metric)]
    kept = [all(stage.keeps(stage.values([one])[0]) for stage in own) for one in (good, bad)]
    assert kept == [True, False]
    assert recipe.duplicates.among
