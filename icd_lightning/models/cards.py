"""Model cards: what lies beside exported weights, for people who have nothing but the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icd_lightning.diffusion import Boundaries, Direction
from icd_lightning.files import write_text
from icd_lightning.models.released import RELEASED
from icd_lightning.models.sources import on_hub

PAPER = "[Invertible Consistency Distillation](https://arxiv.org/abs/2406.14539)"

PAGE = """\
---
library_name: diffusers
{base}tags:
- text-to-image
- invertible-consistency-distillation
---

# {title}

{text}
## Training

```json
{settings}
```
"""

STUDENT = """\
The {direction} model of {paper}: it takes {journey} in {count} evaluations, by jumps between fixed timesteps.

| | |
|---|---|
| boundaries | {ends} |
| jumps | {jumps} |
{lora}| base | the {network} of `{family}` that takes w; {guidance} |

{use}"""

LORA = "| LoRA | rank {rank}, alpha {alpha:g} (scale {scale:g}) |\n"

USE_LORA = """\
`pytorch_lora_weights.safetensors` is for diffusers, and holds its alpha in its header, which diffusers older than 0.35
ignores. The training wrote the same weights for other programs, and for those, as `kohya/{direction}.safetensors`.

```python
{base}pipe.load_lora_weights("/path/to/{direction}")
```

The jumps are no stock scheduler's: `icd generate` and `icd edit` of icd_lightning make them, given both students
by `--forward` and `--reverse`.
"""

BASE_UNET = """\
pipe.unet = UNet2DConditionModel.from_pretrained("/path/to/unet_guided")  # a UNet with time_cond_proj_dim
"""

USE_OTHER = """\
This is a network of its own, in diffusers' layout. The jumps are no stock scheduler's, and `icd generate` and
`icd edit` of icd_lightning make them with LoRA students only: from Python, `icd_lightning.diffusion` makes them.
"""

GUIDED = """\
The guidance-distilled UNet (stage 1) of `{family}`: one evaluation with an embedded guidance scale w (`timestep_cond`),
in place of the two of classifier-free guidance. It was trained for w = {scales}, w = 1 being unguided. Both students of
{paper} start from it.

```python
pipe.unet = UNet2DConditionModel.from_pretrained("/path/to/unet_guided")
```
"""

REPOSITORY = """\
Both students of {paper}: they take a real picture to noise in {count} network evaluations, and back,
with another prompt, in as many.

```python
from icd_lightning import InvertibleConsistencyPipeline

pipe = InvertibleConsistencyPipeline.from_pretrained("{repo}")
pipe.edit("cat.jpg", "a cat on a bench", "a dog on a bench").images[0].save("dog.png")
```

```bash
icd edit cat.jpg --model {repo} --source "a cat on a bench" --target "a dog on a bench"
```

| | |
|---|---|
| boundaries | {ends} |
{lora}| base model | `{family}`, which is loaded from the hub; its licence holds |
| guidance-distilled UNet | {guided} |
"""

JOURNEYS = {"forward": "an image's latents to noise", "reverse": "noise to an image's latents"}
GUIDANCES = {"forward": "unguided, w = 1", "reverse": "any guidance scale w, also one that changes with t"}


def write_student_card(folder: Path, direction: Direction, boundaries: Boundaries, settings: Mapping[str, Any]) -> None:
    """Write a student's README.md; `settings` is what its training was told, `family` and `students` among it."""
    adapted, unet = settings.get("students") == "lora", "prediction_type" in settings["process"]
    text = STUDENT.format(
        direction=direction,
        paper=PAPER,
        journey=JOURNEYS[direction],
        count=boundaries.num_segments,
        ends=", ".join(map(str, boundaries.boundary_timesteps)),
        jumps=", ".join(f"{t} to {s}" for t, s in boundaries.jumps[direction]),
        lora=LORA.format(**settings, scale=settings["alpha"] / settings["rank"]) if adapted else "",
        network="UNet (stage 1)" if unet else "transformer",
        use=USE_LORA.format(direction=direction, base=BASE_UNET if unet else "") if adapted else USE_OTHER,
        family=settings["family"],
        guidance=GUIDANCES[direction],
    )
    write_text(folder / "README.md", _page(f"iCD, {direction} model", text, settings))


def write_guided_card(folder: Path, settings: Mapping[str, Any]) -> None:
    scales = ", ".join(f"{w:g}" for w in settings["guidance_scales"])
    text = GUIDED.format(family=settings["family"], scales=scales, paper=PAPER)
    write_text(folder / "README.md", _page("Guidance-distilled UNet", text, settings))


def repository_card(repo: str, boundaries: Boundaries, index: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The README.md of both students on the hub, beside a `model_index.json` of this content."""
    text = REPOSITORY.format(
        repo=repo,
        paper=PAPER,
        count=boundaries.num_segments,
        ends=", ".join(map(str, boundaries.boundary_timesteps)),
        lora=LORA.format(**settings, scale=settings["alpha"] / settings["rank"]),
        family=settings["family"],
        guided=_guided_in(index.get("guided_unet")),
    )
    return _page("Invertible Consistency Distillation", text, settings)


def _guided_in(released: str | None) -> str:
    if released is None:
        return "`unet_guided/`"
    return f"`{released}`, {RELEASED[released].gigabytes:g} GB, which is downloaded from its authors at the first use"


def _page(title: str, text: str, settings: Mapping[str, Any]) -> str:
    family = settings["family"]
    base = f"base_model: {family}\n" if on_hub(family) else ""
    return PAGE.format(base=base, title=title, text=text, settings=json.dumps(settings, indent=2))
