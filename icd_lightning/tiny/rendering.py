"""Draws the scenes of the tiny world, in numpy with signed distances, so that edges are antialiased."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from icd_lightning.tiny.scenes import CANVAS, COLORS, Scene, Thing

TEXTURE_PERIOD = 10.0  # in pixels of the canvas
DARK_TONE = 0.6  # brightness of a texture's second tone
NOISE_STD = 0.006


def render(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """Draw the scene: uint8 (size, size, 3). The same scene gives the same picture, bit for bit."""
    if size < 8:
        raise ValueError(f"size {size} is too small to show anything; use 8 pixels or more")
    x, y = _grid(size)
    picture = _paint(scene.background.color, scene.background.texture, x, y, scene.background.phase, size)
    for thing in scene.things:
        _put(thing, picture, x, y, size)
    middle = CANVAS / 2
    picture *= 1 + scene.light[0] * (x / middle - 1) + scene.light[1] * (y / middle - 1)
    noisy = np.random.default_rng(scene.noise_seed).standard_normal((size, size, 3), dtype=np.float32)
    noisy *= NOISE_STD
    planes = noisy.transpose(2, 0, 1)
    np.add(picture, planes, out=planes)  # in the memory order of `picture`, twice as fast as `planes += picture`
    return (noisy.clip(0, 1) * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Canvas coordinates of pixel centres, x (1, size) and y (size, 1): thin, as much depends on one of them only."""
    line = ((np.arange(size) + 0.5) * CANVAS / size).astype(np.float32)
    return line[None, :], line[:, None]


def _put(thing: Thing, picture: NDArray[np.float32], x: NDArray, y: NDArray, size: int) -> None:
    """Draw an object over the picture (3, size, size), in place."""
    scale = size / CANVAS
    reach = REACH[thing.shape] * thing.radius * scale + 1.5  # in pixels; a soft edge ends 1.5 pixels out at the latest
    columns, rows = (
        slice(max(0, int(middle * scale - reach)), max(0, int(middle * scale + reach) + 1)) for middle in thing.center
    )
    left, top = x[:, columns] - thing.center[0], y[rows] - thing.center[1]
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    u, v = (cos * left + sin * top) / thing.radius, (cos * top - sin * left) / thing.radius
    cover = (0.5 - _signed_distance(thing.shape, u, v) * (scale * thing.radius)).clip(0, 1)
    paint = _paint(thing.color, thing.texture, left, top, thing.phase, size)
    paint *= 1.0 - 0.18 * np.minimum(u * u + v * v, 1)  # a little rounder than paper
    under = picture[:, rows, columns]
    under += cover * (paint - under)


def _paint(
    color: str, texture: str, x: NDArray, y: NDArray, phase: tuple[float, float], size: int
) -> NDArray[np.float32]:
    """A colour in one or two tones, (3, h, w); x (1, w), y (h, 1) in canvas pixels from the texture's origin."""
    tone = np.asarray(COLORS[color], dtype=np.float32)[:, None, None]
    if texture == "plain":
        return np.full((3, len(y), x.shape[1]), tone)
    sharpness = size / CANVAS * TEXTURE_PERIOD / np.pi / 2  # so that an edge is one picture pixel wide
    a, b = (x + phase[0]) * (2 * np.pi / TEXTURE_PERIOD), (y + phase[1]) * (2 * np.pi / TEXTURE_PERIOD)
    if texture == "striped":
        wave = np.sin((a + b) * 0.75)
    elif texture == "checkered":
        wave = np.sin(a * 0.6) * np.sin(b * 0.6) * 2
    else:  # dotted
        wave = np.cos(a) + np.cos(b) - 0.7
    mix = (0.5 + wave * sharpness * 0.8).clip(0, 1)
    return tone * (1 - (1 - DARK_TONE) * mix)


REACH = {"circle": 0.95, "square": 1.16, "triangle": 1.23, "star": 1.08, "ring": 0.97, "cross": 1.06}
"""How far from its centre a shape has points, in units of its radius."""


def _signed_distance(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance (h, w) of points from the outline, negative inside; all in units of the radius."""
    if shape == "circle":
        return np.hypot(u, v) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.7) - 0.27
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.82
    if shape == "cross":
        long, short = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
        return np.maximum(long - 1.0, short - 0.33)
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(u) - 0.5 * v - 0.5, v - 0.72)
    # star: fold the plane into one of ten half points, then it is the side of a line from tip to notch
    angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    tip, notch = 1.08, 0.46
    nx, ny = notch * np.sin(np.pi / 5), tip - notch * np.cos(np.pi / 5)
    length = np.hypot(nx, ny)
    return (radius * np.cos(angle) * nx + radius * np.sin(angle) * ny - tip * nx) / length
