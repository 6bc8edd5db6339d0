"""The picture world: a caption says what is there, and an edit changes what it names and nothing else."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from icd_lightning.tiny import rendering
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import (
    ABSENT,
    ATTRIBUTES,
    COLORS,
    EDITS,
    LABELS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Scene,
    Thing,
    labels,
    random_edit,
    random_scene,
    vocabulary,
)

MIDDLE = (32.0, 32.0)


def world(count: int, seed: int = 0) -> list[Scene]:
    return [random_scene(np.random.default_rng((seed, index))) for index in range(count)]


def thing(shape="circle", color="red", size="small", texture="plain", center=MIDDLE, **rest) -> Thing:
    return Thing(shape, color, size, texture, center, **{"radius": SIZES[size], **rest})


def one(background=("blue", "plain"), light=(0.0, 0.0), noise_seed=0, **attributes) -> Scene:
    return Scene((thing(**attributes),), Background(*background), light=light, noise_seed=noise_seed)


def distance_from(center: tuple[float, float], size: int = 64) -> np.ndarray:
    """Distance of each pixel's centre from a point, in canvas pixels."""
    line = (np.arange(size) + 0.5) * 64 / size
    return np.hypot(line[None, :] - center[0], line[:, None] - center[1])


# --- scenes -----------------------------------------------------------------------------------------------------------


def group(name: str, words) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


def thing_pattern(slot: str) -> str:
    texture = group(f"texture{slot}", TEXTURES)
    size, color, shape = (group(name + slot, ATTRIBUTES[name]) for name in ("size", "color", "shape"))
    return f"a {size} {color}( {texture})? {shape}"


CAPTION = re.compile(
    f"{thing_pattern('1')}( {group('relation', RELATIONS)} {thing_pattern('2')})?"
    f" on (?P<article>an?) {group('color', COLORS)}( {group('texture', TEXTURES)})? background"
)


def test_the_caption_tells_all_that_has_a_name():
    for scene in world(300):
        found = CAPTION.fullmatch(scene.caption())
        assert found is not None, scene.caption()
        words = found.groupdict()
        for slot, one_of_them in enumerate(scene.things, 1):
            told = [words[f"{name}{slot}"] or "plain" for name in ATTRIBUTES]
            assert told == [getattr(one_of_them, name) for name in ATTRIBUTES]
        assert words["relation"] == scene.relation
        assert (words["color"], words["texture"] or "plain") == (scene.background.color, scene.background.texture)
        assert (words["article"] == "an") == (words["color"][0] in "aeiou")
        assert set(scene.caption().split()) <= vocabulary()


def test_caption_by_hand():
    first, second = thing(center=(16.0, 32.0)), thing("ring", "orange", "large", "dotted", (48.0, 32.0))
    scene = Scene((first, second), Background("orange", "striped"), "left of")
    assert scene.caption() == ("a small red circle left of a large orange dotted ring on an orange striped background")
    assert one(("cyan", "plain")).caption() == "a small red circle on a cyan background"


def test_the_relation_is_where_the_objects_are():
    for scene in world(300):
        if scene.relation is None:
            assert len(scene.things) == 1
            continue
        first, second = (np.array(t.center) for t in scene.things)
        along = (first - second) @ np.array(RELATIONS[scene.relation])
        assert along >= 30
        assert np.abs(first - second).sum() - along <= 4


def test_objects_stand_out_from_the_background():
    assert all(t.color != scene.background.color for scene in world(300) for t in scene.things)


def test_the_generator_alone_decides_the_scene():
    assert world(20) == world(20)
    assert not set(map(repr, world(200))) & set(map(repr, world(200, seed=1)))


def test_every_name_and_every_layout_is_drawn():
    seen: dict[str, Counter] = {name: Counter() for name in LABELS}
    for scene in world(1500):
        for (name, options), label in zip(LABELS.items(), labels(scene), strict=True):
            seen[name][options[label] if label != ABSENT else None] += 1
    for name, options in LABELS.items():
        assert set(options) <= set(seen[name])
    assert 0.56 < seen["layout"]["single"] / 1500 < 0.64


def test_the_world_is_the_one_that_the_shipped_weights_know():
    """To be changed only together with the weights of the tiny family."""
    told = [(scene.caption(), labels(scene).tolist(), scene.to_dict()) for scene in world(100)]
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] == "b9ba0aa858b21cef"
    pictures = np.stack([render(scene) for scene in world(100)]).astype(float)
    np.testing.assert_allclose(pictures.mean((0, 1, 2)), [118.492, 119.073, 116.23], atol=2e-3)
    np.testing.assert_allclose(pictures.std((0, 1, 2)), [80.708, 69.828, 79.076], atol=2e-3)


def test_a_scene_survives_json():
    for scene in world(50):
        values = json.loads(json.dumps(scene.to_dict()))
        again = Scene.from_dict(values | {"original_size": [64, 64]})
        assert again == scene
        assert again.to_dict() == scene.to_dict()
        assert np.array_equal(render(again), render(scene))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Scene((), Background("red", "plain")), "got 0 objects and relation None"),
        (lambda: replace(one(), relation="above"), "got 1 objects and relation 'above'"),
        (lambda: replace(one(), things=(thing(), thing())), "got 2 objects and relation None"),
        (lambda: replace(one(), things=(thing(), thing()), relation="near"), "left of, above; got 2"),
        (lambda: thing("hexagon"), "shape 'hexagon' is not one of circle, square"),
        (lambda: thing(color="pink"), "color 'pink' is not one of red"),
        (lambda: replace(thing(), size="huge"), "size 'huge' is not one of small, large"),
        (lambda: Background("red", "furry"), "texture 'furry' is not one of plain"),
        (lambda: render(one(), 7), "size 7 is too small .* 8 pixels or more"),
    ],
)
def test_what_no_scene_has_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- labels -----------------------------------------------------------------------------------------------------------


def named(scene: Scene) -> dict[str, str | None]:
    return {
        name: None if label == ABSENT else options[label]
        for (name, options), label in zip(LABELS.items(), labels(scene), strict=True)
    }


def test_labels_by_hand():
    left, right = thing("ring", center=(16.0, 34.0)), thing("star", "cyan", "large", "dotted", (48.0, 30.0))
    scene = Scene((left, right), Background("green", "checkered"), "left of")
    expected = {"layout": "horizontal", "background color": "green", "background texture": "checkered"}
    expected |= {"shape 1": "ring", "color 1": "red", "size 1": "small", "texture 1": "plain"}
    expected |= {"shape 2": "star", "color 2": "cyan", "size 2": "large", "texture 2": "dotted"}
    assert named(scene) == expected
    assert named(replace(scene, relation="above"))["layout"] == "vertical"
    assert labels(scene).dtype == np.int64
    assert [value for name, value in named(one()).items() if name.endswith("2")] == [None] * 4


def test_the_object_named_first_lies_left_or_above():
    """So a picture has one caption, and object 1 of the labels is the same for whoever sees only the picture."""
    for scene in world(300):
        if scene.relation is not None:
            (x, y), (x2, y2) = (t.center for t in scene.things)
            assert (x < x2) if scene.layout == "horizontal" else (y < y2)


# --- edits ------------------------------------------------------------------------------------------------------------


def fields(scene: Scene) -> dict[str, object]:
    """Every parameter of a scene by its path."""
    found: dict[str, object] = {"relation": scene.relation, "light": scene.light, "noise_seed": scene.noise_seed}
    found |= {f"background {name}": value for name, value in vars(scene.background).items()}
    for index, one_of_them in enumerate(scene.things):
        found |= {f"{name} {index}": value for name, value in vars(one_of_them).items()}
    return found


def changed(before: Scene, after: Scene) -> set[str]:
    old, new = fields(before), fields(after)
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def edited(kind: str, count: int) -> list[tuple[Scene, Scene]]:
    """Scenes that the edit fits, before and after."""
    fits = [scene for scene in world(4 * count) if len(scene.things) != {"add": 2, "remove": 1}.get(kind)]
    return [(s, random_edit(s, np.random.default_rng(index), kind)[0]) for index, s in enumerate(fits[:count])]


@pytest.mark.parametrize("kind", ["color", "shape", "texture", "size"])
def test_an_edit_of_an_object_changes_it_and_no_pixel_beyond_it(kind):
    for before, after in edited(kind, 40):
        names = changed(before, after)
        index = int(min(names)[-1])
        assert names == {f"{kind} {index}"} | ({f"radius {index}"} if kind == "size" else set())
        assert after.things[index].color != after.background.color
        old, new = before.things[index], after.things[index]
        far = distance_from(old.center) > 1.23 * max(old.radius, new.radius) + 2
        different = (render(before) != render(after)).any(-1)
        assert different.any()
        assert not different[far].any()
        assert before.caption() != after.caption()


def test_a_size_edit_makes_the_object_that_much_larger():
    for before, after in edited("size", 40):
        (old, new), *others = [(a, b) for a, b in zip(before.things, after.things, strict=True) if a != b]
        assert not others
        assert new.radius - old.radius == pytest.approx(SIZES[new.size] - SIZES[old.size])


@pytest.mark.parametrize("part", ["color", "texture"])
def test_an_edit_of_the_background_leaves_the_objects(part):
    for before, after in edited(f"background {part}", 40):
        assert changed(before, after) == {f"background {part}"}
        assert all(t.color != after.background.color for t in after.things)
        different = (render(before) != render(after)).any(-1)
        assert different.any()
        for t in after.things:
            if t.shape != "ring":
                assert not different[distance_from(t.center) < 2].any()


def test_adding_and_removing_touch_one_object():
    for before, after in edited("add", 40):
        (old,) = before.things
        (added,) = (t for t in after.things if t != old)
        assert replace(after, things=before.things, relation=None) == before
        assert added.color != after.background.color
        first, second = (np.array(t.center) for t in after.things)
        assert (second - first) @ -np.array(RELATIONS[after.relation]) >= 18
        far = distance_from(added.center) > 1.23 * added.radius + 2
        different = (render(before) != render(after)).any(-1)
        assert different.any()
        assert not different[far].any()
    for before, after in edited("remove", 40):
        assert after == replace(before, things=before.things[:1], relation=None)


def test_an_object_is_added_on_either_side():
    places = Counter((after.relation, after.things[0] == before.things[0]) for before, after in edited("add", 40))
    assert set(places) == {(relation, side) for relation in RELATIONS for side in (True, False)}


def test_removing_what_was_added_behind_gives_the_picture_back():
    behind = [(before, after) for before, after in edited("add", 20) if after.things[0] == before.things[0]]
    assert behind
    for before, after in behind:
        back, _ = random_edit(after, np.random.default_rng(0), "remove")
        assert back == before
        assert np.array_equal(render(back), render(before))


def test_every_kind_of_edit_happens():
    scenes = world(200)
    drawn = [random_edit(scene, np.random.default_rng(index)) for index, scene in enumerate(scenes)]
    assert {kind for _, kind in drawn} == set(EDITS)
    assert drawn == [random_edit(scene, np.random.default_rng(index)) for index, scene in enumerate(scenes)]
    for (after, kind), before in zip(drawn, scenes, strict=True):
        assert after != before
        assert len(after.things) - len(before.things) == {"add": 1, "remove": -1}.get(kind, 0)


def test_edits_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    single, pair = one(), next(scene for scene in world(20) if scene.relation)
    with pytest.raises(ValueError, match=r"'remove' does not fit this scene; possible: color, .*, add$"):
        random_edit(single, rng, "remove")
    with pytest.raises(ValueError, match=r"'add' does not fit this scene; possible: color, .*, remove$"):
        random_edit(pair, rng, "add")
    with pytest.raises(ValueError, match="'rotate' does not fit"):
        random_edit(pair, rng, "rotate")


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 33, 64, 128])
def test_a_picture_has_the_size_that_was_asked_for(size):
    picture = render(world(1)[0], size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous


def test_the_same_scene_gives_the_same_picture():
    for scene in world(20):
        assert np.array_equal(render(scene), render(replace(scene)))
        assert not np.array_equal(render(scene), render(replace(scene, noise_seed=scene.noise_seed + 1)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [1.1, 9.0, 60.0])
def test_no_shape_paints_beyond_its_reach(shape, radius):
    """Not even with the soft edge, 1.5 pixels on: radius is that of the object in pixels."""
    angle, beyond = np.meshgrid(np.linspace(0, 2 * np.pi, 3601), np.linspace(0, 5, 50))
    r = rendering.REACH[shape] + (1.5 + beyond) / radius
    assert (rendering._signed_distance(shape, r * np.cos(angle), r * np.sin(angle)) * radius).min() >= 0.5


@pytest.mark.parametrize("size", [8, 64, 100])
def test_the_renderer_may_leave_out_what_lies_beyond_the_reach(monkeypatch, size):
    rng = np.random.default_rng(0)
    scenes = [
        one(shape=shape, radius=radius, angle=rng.uniform(-3, 3), center=tuple(rng.uniform(-10, 74, 2)))
        for shape in SHAPES
        for radius in (3.0, 9.0, 30.0)
        for _ in range(3)
    ]
    pictures = [render(scene, size) for scene in scenes]
    monkeypatch.setattr(rendering, "REACH", dict.fromkeys(SHAPES, 100.0))
    assert all(np.array_equal(render(scene, size), picture) for scene, picture in zip(scenes, pictures, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_antialiased(shape):
    """An object moved by a tenth of a pixel changes edge pixels by about a tenth of the contrast, and none by more."""
    before, after = (
        render(one(shape=shape, color="white", size="large", center=(32 + shift, 32.0))).astype(int)
        for shift in (0, 0.1)
    )
    contrast = 255 * (COLORS["white"][0] - COLORS["blue"][0])
    assert 0.05 * contrast < np.abs(after - before)[..., 0].max() < 0.12 * contrast


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_larger_picture_shows_the_same(texture):
    """Averaged over blocks of 2 x 2, a picture of twice the size is the picture, but for the noise and fine edges."""
    scene = one(("green", texture), size="large", texture=texture, shape="star", light=(0.05, -0.05))
    small = render(scene).astype(float)
    large = render(scene, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(small - large).mean() < 2.5
    assert np.abs(small - large).max() < 50


def test_bright_and_dark_end_at_the_ends_of_the_range():
    """What light and noise push over the ends stays there, and does not come back at the other."""
    bright = render(one(("white", "plain"), light=(0.1, 0.1)))
    assert bright[-8:, -8:].min() == 255
    assert bright[:8, :8].min() > 180
    dark = render(one(("red", "striped"), light=(-0.1, -0.1)))
    assert dark[-16:, -16:, 1].max() < 50


def test_noise_and_light_are_slight():
    flat = render(one(("blue", "plain"))).astype(float)[distance_from(MIDDLE) > 14]
    np.testing.assert_allclose(flat.mean(0), np.array(COLORS["blue"]) * 255, atol=0.3)
    np.testing.assert_allclose(flat.std(0), 0.006 * 255, rtol=0.1)
    lit = render(one(("blue", "plain"), light=(0.1, 0.0))).astype(float)
    assert lit[:, -1, 2].mean() / lit[:, 0, 2].mean() == pytest.approx(1.1 / 0.9, rel=0.02)


@pytest.mark.parametrize("texture", [texture for texture in TEXTURES if texture != "plain"])
def test_a_texture_has_two_tones_of_one_colour(texture):
    flat = render(one(("white", texture))).astype(float)[distance_from(MIDDLE) > 14][:, 0] / 255
    tone = COLORS["white"][0]
    near = [np.abs(flat - level * tone) < 0.05 for level in (1.0, rendering.DARK_TONE)]
    assert all(share.mean() > 0.15 for share in near)
    assert flat.min() > rendering.DARK_TONE * tone - 0.05
