"""The tiny world: procedural pictures with captions, whose edits have a known true result.

A `Scene` holds every parameter of a picture, down to the phase of its textures and the seed of its noise. Changing one
attribute with `dataclasses.replace` (or drawing a `random_edit`) and rendering again gives the *true* edited picture,
equal to the first wherever the edit does not reach. `rendering.render` draws it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.13, 0.14),
    "orange": (1.00, 0.56, 0.08),
    "yellow": (0.98, 0.90, 0.20),
    "green": (0.13, 0.65, 0.24),
    "cyan": (0.25, 0.83, 0.88),
    "blue": (0.13, 0.28, 0.85),
    "purple": (0.55, 0.20, 0.72),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = {"small": 10.5, "large": 15.0}  # radius in pixels of a 64-pixel picture
TEXTURES = ("plain", "striped", "dotted", "checkered")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
}
"""What an object can be; a background has a color and a texture."""
# Without "right of" and "below": a causal text encoder reads an object's words before the relation, so that where the
# object named first lies would depend on a word its own tokens cannot see. So a scene has one caption, too.
RELATIONS = {"left of": (-1, 0), "above": (0, -1)}
LAYOUTS = ("single", "horizontal", "vertical")
EDITS = ("color", "shape", "texture", "size", "background color", "background texture", "add", "remove")

CANVAS = 64.0  # all lengths below are in pixels of a picture of this size

HELD_OUT_SEED = 1_000_003  # scenes of this seed are for validation; no training seed may equal it

TRAINING_SEEDS = range(7)  # those of the shipped family's trainings, and of the pictures that validated them


def check_held_out(seed: int) -> int:
    """A seed whose scenes the shipped family has not seen."""
    if seed in TRAINING_SEEDS:
        last = TRAINING_SEEDS[-1]
        raise ValueError(f"seed {seed} is of pictures that tiny was trained with (0 to {last}): take another")
    return seed


@dataclass(frozen=True)
class Thing:
    """One object; `center`, `radius` and `phase` in canvas pixels, `angle` in radians."""

    shape: str
    color: str
    size: str
    texture: str
    center: tuple[float, float]
    radius: float
    angle: float = 0.0
    phase: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        _check(self, ATTRIBUTES)

    def words(self) -> str:
        """Name the object as a caption does, e.g. "small red striped circle"."""
        return " ".join(w for w in (self.size, self.color, self.texture, self.shape) if w != "plain")


@dataclass(frozen=True)
class Background:
    """What lies behind the objects; `phase` in canvas pixels."""

    color: str
    texture: str
    phase: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        _check(self, ("color", "texture"))

    def words(self) -> str:
        """Name the background as a caption does, e.g. "green checkered background"."""
        return " ".join(w for w in (self.color, self.texture, "background") if w != "plain")


@dataclass(frozen=True)
class Scene:
    """All parameters of one picture: one object, or two of which the first lies `relation` the second."""

    things: tuple[Thing, ...]
    background: Background
    relation: str | None = None
    light: tuple[float, float] = (0.0, 0.0)
    noise_seed: int = 0

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2) or (self.relation in RELATIONS) != (len(self.things) == 2):
            raise ValueError(
                f"a scene has one object and no relation, or two and one of {', '.join(RELATIONS)}; "
                f"got {len(self.things)} objects and relation {self.relation!r}"
            )

    def caption(self) -> str:
        """Describe the scene, e.g. "a small red circle left of a large blue ring on a green checkered background"."""
        first = _with_article(self.things[0].words())
        if self.relation is not None:
            first = f"{first} {self.relation} {_with_article(self.things[1].words())}"
        return f"{first} on {_with_article(self.background.words())}"

    def draw(self, size: int = 64) -> NDArray[np.uint8]:
        """The picture, uint8 (size, size, 3)."""
        from icd_lightning.tiny.rendering import render

        return render(self, size)

    @property
    def layout(self) -> str:
        """How the objects lie, one of LAYOUTS."""
        if self.relation is None:
            return "single"
        return "horizontal" if RELATIONS[self.relation][1] == 0 else "vertical"

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, strings and numbers, fit for JSON; `from_dict` restores the scene exactly."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Scene:
        """Restore a scene from `to_dict`, also after a trip through JSON (which turns tuples into lists).

        What else the mapping holds is ignored. Raises ValueError for values that no scene has.
        """
        things = tuple(
            Thing(**{**thing, "center": tuple(thing["center"]), "phase": tuple(thing["phase"])})
            for thing in values["things"]
        )
        background = Background(**{**values["background"], "phase": tuple(values["background"]["phase"])})
        rest = {"relation": values["relation"], "light": tuple(values["light"]), "noise_seed": values["noise_seed"]}
        return Scene(things, background, **rest)


def _check(part: Thing | Background, names: Iterable[str]) -> None:
    for name in names:
        if (value := getattr(part, name)) not in ATTRIBUTES[name]:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(ATTRIBUTES[name])}")


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: one object or, in two of five cases, two; colours of objects differ from the background's."""
    background = Background(_pick(rng, COLORS), _pick(rng, TEXTURES), _phase(rng))
    relation = _pick(rng, RELATIONS) if rng.random() < 0.4 else None
    count = 1 if relation is None else 2
    things = [_random_thing(rng, center, background.color) for center in _centers(rng, relation)[:count]]
    light = rng.uniform(-0.1, 0.1, 2)
    return Scene(tuple(things), background, relation, (float(light[0]), float(light[1])), int(rng.integers(2**31)))


def scene_at(seed: int, index: int) -> Scene:
    """The scene number `index` of the world `seed`; the same on every machine."""
    return random_scene(np.random.default_rng((seed, index)))


def random_edit(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> tuple[Scene, str]:
    """Change one attribute of `scene` at random; return the true result and the kind of edit (one of EDITS).

    All else, to the phase of the textures and the noise, stays as it was. "add" needs a scene of one object and
    "remove" one of two: a `kind` that does not fit raises ValueError.
    """
    possible = [k for k in EDITS if k != ("add" if len(scene.things) == 2 else "remove")]
    kind = kind if kind is not None else _pick(rng, possible)
    if kind not in possible:
        raise ValueError(f"edit {kind!r} does not fit this scene; possible: {', '.join(possible)}")
    if kind == "add":
        return _add_thing(scene, rng), kind
    if kind == "remove":
        return replace(scene, things=scene.things[:1], relation=None), kind
    if kind == "background texture":
        texture = _other(rng, TEXTURES, {scene.background.texture})
        return replace(scene, background=replace(scene.background, texture=texture)), kind
    if kind == "background color":
        color = _other(rng, COLORS, {scene.background.color, *(thing.color for thing in scene.things)})
        return replace(scene, background=replace(scene.background, color=color)), kind
    index = int(rng.integers(len(scene.things)))
    things = list(scene.things)
    things[index] = _edit_thing(things[index], rng, kind, avoid={scene.background.color})
    return replace(scene, things=tuple(things)), kind


def _random_thing(rng: np.random.Generator, center: tuple[float, float], avoid: str) -> Thing:
    size = _pick(rng, SIZES)
    return Thing(
        shape=_pick(rng, SHAPES),
        color=_other(rng, COLORS, {avoid}),
        size=size,
        texture=_pick(rng, TEXTURES),
        center=center,
        radius=SIZES[size] + float(rng.uniform(-0.5, 0.5)),
        angle=float(rng.uniform(-0.08, 0.08)),
        phase=_phase(rng),
    )


def _centers(rng: np.random.Generator, relation: str | None) -> list[tuple[float, float]]:
    """Places that leave room for two large objects, the first lying `relation` the second."""
    middle = CANVAS / 2
    along, across = rng.uniform(-1, 1, 2), rng.uniform(-2, 2, 2)
    if relation is None:
        return [(middle + float(across[0]), middle + float(across[1]))]
    dx, dy = RELATIONS[relation]
    return [
        (middle + sign * dx * 16 + float(a if dx else c), middle + sign * dy * 16 + float(a if dy else c))
        for sign, a, c in zip((1, -1), along, across, strict=True)
    ]


def _edit_thing(thing: Thing, rng: np.random.Generator, kind: str, avoid: set[str]) -> Thing:
    if kind == "color":
        return replace(thing, color=_other(rng, COLORS, avoid | {thing.color}))
    if kind == "size":
        size = _other(rng, SIZES, {thing.size})
        return replace(thing, size=size, radius=thing.radius - SIZES[thing.size] + SIZES[size])
    return replace(thing, **{kind: _other(rng, ATTRIBUTES[kind], {getattr(thing, kind)})})


def _add_thing(scene: Scene, rng: np.random.Generator) -> Scene:
    """Add a second object on the side with more room; the first may lie near the middle, so the new one is small."""
    old, middle = scene.things[0], CANVAS / 2
    dx, dy = middle - old.center[0], middle - old.center[1]
    horizontal = abs(dx) >= abs(dy)
    comes_second = (dx if horizontal else dy) >= 0
    place = middle + (21 if comes_second else -21)
    center = (place, old.center[1]) if horizontal else (old.center[0], place)
    new = replace(_random_thing(rng, center, scene.background.color), size="small", radius=SIZES["small"])
    things = (old, new) if comes_second else (new, old)
    return replace(scene, things=things, relation="left of" if horizontal else "above")


def _pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options: Iterable[str], avoid: set[str]) -> str:
    return _pick(rng, [option for option in options if option not in avoid])


def _phase(rng: np.random.Generator) -> tuple[float, float]:
    x, y = rng.uniform(-1.5, 1.5, 2)
    return (float(x), float(y))


LABELS: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "background color": ATTRIBUTES["color"],
    "background texture": ATTRIBUTES["texture"],
    **{f"{name} {slot}": options for slot in (1, 2) for name, options in ATTRIBUTES.items()},
}
ABSENT = -100  # torch's cross entropy ignores it


def labels(scene: Scene) -> NDArray[np.int64]:
    """What a viewer should recognise, int64 (len(LABELS),): indices into LABELS, ABSENT for an object not there."""
    values = {
        "layout": scene.layout,
        "background color": scene.background.color,
        "background texture": scene.background.texture,
    }
    for slot, thing in enumerate(scene.things, 1):
        values |= {f"{name} {slot}": getattr(thing, name) for name in ATTRIBUTES}
    return np.array([LABELS[k].index(values[k]) if k in values else ABSENT for k in LABELS], dtype=np.int64)


def vocabulary() -> set[str]:
    """Every word that a caption can hold."""
    names = (COLORS, SHAPES, SIZES, TEXTURES, RELATIONS)
    return {"a", "an", "on", "background", *(word for group in names for name in group for word in name.split())}
