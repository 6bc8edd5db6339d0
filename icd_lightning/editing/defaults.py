"""How a model is edited best where a call does not say: as its folder says, or as in the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from icd_lightning.diffusion import Boundaries
from icd_lightning.models.family import EditingDefaults, Family

DEFAULTS = ("guidance_scale", "tau", "edit_guidance_scale", "attention_control", "closed_vocabulary")
"""What a pipeline's config says for calls that do not."""

P2P_GUIDANCE_SCALE = 20.0  # of edits by attention control with SD1.5 (arXiv:2406.14539)


def suitable_tau(boundaries: Boundaries) -> float:
    """The paper's tau for these segments: guide in all but the first step, 0.8 for 779 and 0.7 for 679 or 699."""
    last = boundaries.boundary_timesteps[-2]
    return math.ceil(10 * last / boundaries.num_train_timesteps) / 10 if last else 1.0


def defaults_of(family: Family, boundaries: Boundaries | None = None) -> dict[str, Any]:
    """What the model's folder says, or the paper: SD1.5 by Prompt-to-Prompt at w 20, others by swapping the prompt.

    tau is for students of these boundaries, by default the paper's four.
    """
    source = family.source
    if told := told_by(source.index, f"{family.model}/model_index.json"):
        return told
    if source.folder is not None and (source.folder / "icd.json").is_file():
        return asdict(family.load_defaults())
    tau = suitable_tau(boundaries or Boundaries.uniform(4))
    paper: dict[str, Any] = {"guidance_scale": EditingDefaults.guidance_scale, "tau": tau}
    by_attention = {"edit_guidance_scale": P2P_GUIDANCE_SCALE, "attention_control": True}
    others = any(map(source.has, ("text_encoder_2", "transformer")))  # SDXL, and all that are no UNets
    return paper if others else {**paper, **by_attention}


def told_by(index: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a pipeline's config says, which may be a stranger's; nothing unless it says all."""
    if not index.keys() >= set(DEFAULTS):
        return {}
    told = {name: index[name] for name in DEFAULTS}
    try:
        if not isinstance(told["attention_control"], bool):
            raise ValueError(f"attention_control {told['attention_control']!r} is neither true nor false")
        for scale in (told["guidance_scale"], told["edit_guidance_scale"]):
            EditingDefaults(scale, told["tau"], told["closed_vocabulary"])
    except ValueError as error:
        raise ValueError(f"{place} says how the model is edited, and {error}") from error
    return told


def edits_by_attention(family: Family) -> bool:
    """Whether the family is edited best by Prompt-to-Prompt, else by swapping the prompt."""
    return bool(defaults_of(family).get("attention_control"))
