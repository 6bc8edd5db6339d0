"""The model card of the shipped family: how it was made, and what it was measured to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from icd_lightning.files import write_text
from icd_lightning.tiny.bars import Bar
from icd_lightning.tiny.packaging import RECIPES, Recipe

TINY = """# The tiny family

A text-to-image latent diffusion model of the procedural picture world in `icd_lightning/tiny/scenes.py`: 64 x 64
pixels, one or two objects on a background, captions such as "a small red striped circle left of a large blue ring on a
green checkered background". It exists so that all of invertible consistency distillation runs on a laptop's processor,
through the very code that serves SD1.5 and SDXL. It knows nothing but this world.

| part | class | what it is |
|---|---|---|
| `vae` | `AutoencoderDC` | 64 x 64 pixels <-> latents of 16 x 8 x 8 with unit variance |
| `tokenizer`, `text_encoder` | `CLIPTokenizer`, `CLIPTextModel` | one token a word, 24 tokens, width 128 |
| `unet` | `UNet2DConditionModel` | the teacher, v-prediction |
| `unet_guided` | `UNet2DConditionModel` | stage 1: the teacher with a guidance embedding |
| `students/forward`, `students/reverse` | LoRA | stage 2: the two students of iCD |
| `scene_network` | `SceneNetwork` | reads pictures, to judge them; it is not CLIP, Inception or LPIPS |

Everything is float16 on disk. `make tiny-weights` trains it from nothing, by the configurations kept with the curves in
`training/`. The pictures are drawn by this repository's code and the weights are under its licence.
"""

TINY_FLOW = """# tiny_flow

A flow-matching transformer of the tiny family's picture world (`icd_lightning/weights/tiny`), whose autoencoder,
tokenizer, text encoder and scene network it shares. It is to FLUX.1-dev what tiny is to SD1.5: the same class at a
small width, with w as an input, so that no stage 1 stands before the students.

| part | class | what it is |
|---|---|---|
| `transformer` | `FluxTransformer2DModel` | the teacher, which takes w; a token for each place of the latents |
| `students/forward`, `students/reverse` | LoRA | the two students of iCD |

Everything is float16 on disk. `make tiny-flow-weights` trains it, by the configurations kept with the curves in
`training/`. The weights are under this repository's licence.
"""
HEADS = {"tiny": TINY, "tiny_flow": TINY_FLOW}


def write_card(folder: Path, bars: Sequence[Bar], *, count: int, seed: int) -> Path:
    """Write `README.md` beside the weights, ending with their `notes.md` if there is one; return its path."""
    name = "tiny" if folder.name not in RECIPES else folder.name
    command = f"icd tiny report {'' if name == 'tiny' else f'--model {name} '}--count {count} --seed {seed} --card"
    rows = "\n".join(f"| {bar.name} | {bar.value:.4g} | {_limit(bar)} |" for bar in bars)
    measured = (
        f"## Measured\n\nOn {count} held-out scenes of the world with seed {seed}, by `{command}`; other seeds give "
        f"other scenes.\n\n| what | measured | bar |\n|---|---|---|\n{rows}\n"
    )
    file = folder / "README.md"
    notes = folder / "notes.md"
    by_hand = [notes.read_text()] if notes.is_file() else []
    write_text(file, "\n".join([HEADS[name], _trainings(folder / "training", RECIPES[name]), measured, *by_hand]))
    return file


def _limit(bar: Bar) -> str:
    return "" if bar.limit is None else f"at least {bar.limit:g}{'' if bar.passed else ', MISSED'}"


def _trainings(folder: Path, recipe: Recipe) -> str:
    """One line a stage, out of the configuration that it ran with."""
    rows = []
    for stage in recipe.stages:
        config = yaml.safe_load((folder / stage / "config.yaml").read_text())
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        values = (config["trainer"]["max_steps"], data["batch_size"], model["optimizer"]["lr"], model["seed"])
        rows.append(f"| {stage} | " + " | ".join(map(str, values)) + " |")
    return (
        "## Trained\n\n| stage | steps | batch | learning rate | seed |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
