"""Baselines equal to what the reference implementations produced."""

import pytest
import torch
from baselines_case import golden_parts
from golden_case import load_json

from icd_lightning.diffusion import Step, StepGuidance
from icd_lightning.editing.baselines.base import Inversion
from icd_lightning.editing.baselines.negative_prompt import NegativePromptInversion
from icd_lightning.editing.baselines.null_text import NullTextInversion
from icd_lightning.models.conditioning import Conditioning

UNGUIDED = StepGuidance(1.0)


@pytest.fixture(scope="module")
def golden():
    return golden_parts()


def close(actual: torch.Tensor, expected: torch.Tensor, guidance_scale: float = 1.0) -> None:
    # Guidance multiplies the rounding of 50 steps: the golden w 8 itself is 3e-4 from the same loop in float64.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * guidance_scale)


def test_negative_prompt_inversion(golden):
    parts, tensors, prompt = golden
    method, steps = NegativePromptInversion(parts), list[Step]()
    inversion = method.invert_latents(tensors["x0"], [prompt], on_step=steps.append)
    close(steps[24].x, tensors["invert_w1.x_25"])
    close(inversion.noise, tensors["invert_w1.x_T"])
    guided = method.generate_latents([prompt], inversion, guidance=method.guidance, on_step=steps.append)
    close(guided, tensors["npi.decode_w8.x_0"])
    close(guided, tensors["decode_w1.x_0"])
    close(method.generate_latents([prompt], inversion, guidance=UNGUIDED), tensors["decode_w1.x_0"])
    assert sum(step.nfe for step in steps) == 150


@pytest.fixture(scope="module")
def guided_path(golden) -> list[torch.Tensor]:
    """The latents of guided decoding with the reference's null embeddings, from noise to data."""
    (parts, tensors, prompt), steps = golden, list[Step]()
    method = NullTextInversion(parts)
    inversion = Inversion([prompt], tensors["x0"], tensors["invert_w1.x_T"], list(tensors["nti.null_embeds"]))
    method.generate_latents([prompt], inversion, guidance=method.guidance, on_step=steps.append)
    return [inversion.noise, *(step.x for step in steps)]


@pytest.fixture(scope="module")
def unguided_path(golden) -> list[torch.Tensor]:
    """The latents of unguided inversion, from noise to data."""
    (parts, tensors, prompt), steps = golden, list[Step]()
    plain = NegativePromptInversion(parts).invert_latents(tensors["x0"], [prompt], on_step=steps.append)
    path = [*(step.x for step in steps[::-1]), tensors["x0"]]
    torch.testing.assert_close(path[0], plain.noise)
    return path


@pytest.mark.parametrize("index", [0, 24, 40])
def test_one_fit_of_null_text_inversion(golden, unguided_path, guided_path, index):
    """Each from the reference's own state, to 1e-4 but for values whose gradients are of the size of rounding.

    Adam divides those by their own size. The golden fits differ from the same in float64 as much, and 50 add up.
    """
    parts, tensors, prompt = golden
    method = NullTextInversion(parts)
    assert method.guidance.guidance_scale == load_json("baselines.json")["guidance_scale"]
    source, null = parts.conditioner([prompt]), parts.conditioner.unconditional(1)
    if index:
        null = Conditioning(prompt_embeds=tensors["nti.null_embeds"][index - 1])
    with torch.no_grad():
        _, fitted, rounds = method.fit_step(guided_path[index], unguided_path[index + 1], index, source, null)
    error = (fitted.tensors["prompt_embeds"] - tensors["nti.null_embeds"][index]).abs()
    assert error.mean() < 3e-5
    assert (error > 1e-4).float().mean() < 0.05
    assert (error > 1e-3).float().mean() < 0.02
    moved = (tensors["nti.null_embeds"][index] - null.tensors["prompt_embeds"]).abs()
    assert moved.max() > 1e-2
    assert rounds == load_json("baselines.json")["nti"]["inner_steps"]


def test_decoding_with_null_embeddings(golden, guided_path):
    close(guided_path[-1], golden[1]["nti.decode_w8.x_0"], 8.0)


@pytest.mark.slow
def test_null_text_inversion(golden):
    parts, tensors, prompt = golden
    method, steps = NullTextInversion(parts), list[Step]()
    inversion = method.invert_latents(tensors["x0"], [prompt], on_step=steps.append)
    error = (torch.stack(list(inversion.per_step)) - tensors["nti.null_embeds"]).abs()
    assert error.max() < 5e-2
    assert error.mean() < 1e-3
    decoded = method.generate_latents([prompt], inversion, guidance=method.guidance)
    torch.testing.assert_close(decoded, tensors["nti.decode_w8.x_0"], rtol=1e-3, atol=5e-3)
    assert sum(step.nfe for step in steps) == 50 * (1 + 12)
