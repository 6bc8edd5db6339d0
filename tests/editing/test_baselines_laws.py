"""What single baselines are for, on networks known by formula or random."""

import math
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from analytic import Gaussian
from baselines_case import analytic_parts
from diffusers import UNet2DConditionModel

from icd_lightning.diffusion import VP, Step, StepGuidance, ddim_invert, ddim_timesteps
from icd_lightning.editing.baselines.ddim import DDIMPromptToPrompt
from icd_lightning.editing.baselines.edit_friendly import EditFriendlyInversion
from icd_lightning.editing.baselines.infedit import CONTROL, InfEdit
from icd_lightning.editing.baselines.negative_prompt import NegativePromptInversion
from icd_lightning.editing.baselines.null_text import NullTextInversion, NullTextOptimization
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.baselines.pnp_inversion import PnPInversion
from icd_lightning.editing.baselines.renoise import (
    Regularization,
    ReNoise,
    Renoising,
    Sampler,
    auto_correlation,
    patch_divergence,
)
from icd_lightning.editing.baselines.sdedit import SDEdit
from icd_lightning.editing.methods import METHODS, build
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.unified import BLUR
from icd_lightning.models.family import Family
from icd_lightning.registry import typed

SOURCE, TARGET = ["a large red circle", "a small blue square"], ["a large blue circle", "a small star"]
UNGUIDED, GUIDED = StepGuidance(1.0), StepGuidance(3.0)


@pytest.fixture(scope="module")
def parts(random_family) -> Parts:
    return Parts.load(Family(str(random_family)))


@pytest.fixture(scope="module")
def few_step_parts(random_family) -> Parts:
    return Parts.load(Family(str(random_family)), few_step=True)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


# Edit-friendly DDPM


@pytest.mark.parametrize("skip", [0, 3, 6])
def test_the_stored_noise_brings_the_picture_back(parts, latents, skip):
    method = EditFriendlyInversion(parts, num_inference_steps=10, skip=skip)
    steps = list[Step]()
    inversion = method.invert_latents(latents, SOURCE, seed=3, on_step=steps.append)
    assert len(inversion.per_step) == len(steps) == 10 - skip
    close(method.generate_latents(SOURCE, inversion, guidance=UNGUIDED), latents)
    assert not torch.allclose(method.generate_latents(TARGET, inversion, guidance=GUIDED), latents, atol=0.1)


def test_noisings_are_independent(latents):
    """So the stored noise of neighbours is more than a sampler would draw, and correlates, as the paper says."""
    process = VP()
    gaussian = analytic_parts(Gaussian(0.0, 1.0, process), process)  # data that are noise: nothing is to be removed
    method = EditFriendlyInversion(gaussian, num_inference_steps=50, skip=0)
    inversion = method.invert_latents(latents, ["source"] * 2)
    middle = torch.stack(list(inversion.per_step[5:45]))
    assert middle.var() > 2
    assert (middle[1:] * middle[:-1]).mean() < -0.3 * middle.var()


@pytest.mark.parametrize("skip", [-1, 10])
def test_skipping_all_is_refused(parts, skip):
    with pytest.raises(ValueError, match=f"skip {skip} must be 0 or more and less than num_inference_steps 10"):
        EditFriendlyInversion(parts, num_inference_steps=10, skip=skip)


# Null-text inversion


def test_null_embeddings_bring_guided_decoding_back(parts, latents):
    errors = []
    for inner_steps in (1, 15):
        optimization = NullTextOptimization(inner_steps=inner_steps, tolerance=0.0, tolerance_growth=0.0)
        method = NullTextInversion(parts, num_inference_steps=3, guidance_scale=5.0, optimization=optimization)
        inversion = method.invert_latents(latents, SOURCE)
        unguided = method.generate_latents(SOURCE, inversion, guidance=UNGUIDED)
        errors.append((method.generate_latents(SOURCE, inversion, guidance=method.guidance) - unguided).square().mean())
    assert errors[1] < 0.7 * errors[0], errors


def test_a_sample_stops_for_itself(parts, latents):
    """Tolerance that only some meet: what a sample becomes does not depend on how long its neighbour takes."""
    optimization = NullTextOptimization(inner_steps=4, tolerance=1e-3, tolerance_growth=0.0)
    method = NullTextInversion(parts, num_inference_steps=3, optimization=optimization)
    scaled = torch.stack([latents[0], 0.05 * latents[1]])
    steps = list[Step]()
    both = method.invert_latents(scaled, SOURCE, on_step=steps.append)
    for i in range(2):
        alone = method.invert_latents(scaled[i : i + 1], SOURCE[i : i + 1])
        for together, one in zip(both.per_step, alone.per_step, strict=True):
            close(together[i : i + 1], one, atol=2e-3)


def test_later_steps_are_fitted_less_closely(parts, latents):
    optimization = NullTextOptimization(inner_steps=3, tolerance=0.0, tolerance_growth=1e3)  # none, then a lot
    method, steps = NullTextInversion(parts, num_inference_steps=3, optimization=optimization), list[Step]()
    method.invert_latents(latents, SOURCE, on_step=steps.append)
    assert [step.nfe - 2 for step in steps[3:]] == [3, 1, 1]


# DDIM with Prompt-to-Prompt


def test_the_sources_branch_is_guided_away_from_its_path(parts, latents):
    """As in PIE-Bench: beside the target's it is plain guided decoding, and no reconstruction."""
    method = DDIMPromptToPrompt(parts, num_inference_steps=5, guidance_scale=3.0)
    inversion, down = method.invert_latents(latents, SOURCE), list[Step]()
    close(inversion.noise, NegativePromptInversion(parts, num_inference_steps=5).invert_latents(latents, SOURCE).noise)
    told = {"guidance": method.guidance, "control": method.control}
    method.generate_latents(TARGET, inversion, on_step=down.append, **told)
    alone = method.generate_latents(SOURCE, inversion, guidance=method.guidance)
    close(down[-1].x[:2], alone, atol=1e-3)
    assert not torch.allclose(alone, method.generate_latents(SOURCE, inversion, guidance=UNGUIDED), atol=0.1)


# PnP-Inversion


def test_the_sources_branch_stays_on_its_path(parts, latents):
    method = PnPInversion(parts, num_inference_steps=10)
    up, down = list[Step](), list[Step]()
    inversion = method.invert_latents(latents, SOURCE, on_step=up.append)
    assert max(float(difference.abs().max()) for difference in inversion.per_step) > 0.1  # guidance leaves the path
    for guidance in (method.guidance, GUIDED, UNGUIDED):
        down.clear()
        method.generate_latents(TARGET, inversion, guidance=guidance, on_step=down.append)
        path = [*(step.x for step in up[8::-1]), latents]
        for step, expected in zip(down, path, strict=True):
            close(step.x[:2], expected, atol=1e-3)


# InfEdit


@pytest.mark.parametrize("control", [None, CONTROL], ids=["two branches", "three branches"])
@pytest.mark.parametrize("few_step", [True, False])
def test_the_same_prompt_returns_the_source(parts, few_step_parts, latents, few_step, control):
    method = InfEdit(few_step_parts if few_step else parts)
    inversion, steps = method.invert_latents(latents, SOURCE, seed=1), list[Step]()
    told = {"guidance": UNGUIDED, "control": control}
    close(method.generate_latents(SOURCE, inversion, on_step=steps.append, **told), latents)
    assert {len(step.x) for step in steps} == ({4} if control is None else {4, 6})
    for step in steps:
        source, *others = step.x.split(2)
        for branch in others:
            close(branch, source)
    close(steps[-1].x[:2], latents)
    edited = method.generate_latents(TARGET, inversion, guidance=GUIDED, control=control)
    assert not torch.allclose(edited, latents, atol=0.1)


def test_a_mutual_branch_is_its_source_until_it_is_run(few_step_parts, latents):
    """A batch runs the branch from the first step on that any of its pictures needs it; the others' results stay."""
    method = InfEdit(few_step_parts)
    inversion, steps = method.invert_latents(latents, SOURCE, seed=1), list[Step]()
    for control, cost in ((CONTROL, 12 * 2 + 4), (None, 12 * 2)):
        steps.clear()
        method.generate_latents(TARGET, inversion, guidance=GUIDED, control=control, on_step=steps.append)
        assert sum(step.nfe for step in steps) == cost
    steps.clear()
    each = [replace(CONTROL, self_replace=0.0), CONTROL]
    both = method.generate_latents(TARGET, inversion, guidance=GUIDED, control=each, on_step=steps.append)
    assert sum(step.nfe for step in steps) == 12 * 3
    for index, step in enumerate(steps):
        source, mutual, _ = step.x.split(2)
        assert torch.allclose(source[1], mutual[1], atol=1e-4) == (index < 8)
        assert not torch.allclose(source[0], mutual[0], atol=1e-4)
    for i in range(2):
        one = method.invert_latents(latents[i : i + 1], SOURCE[i : i + 1], seed=1 + i)
        alone = method.generate_latents(TARGET[i : i + 1], one, guidance=GUIDED, control=each[i])
        close(both[i : i + 1], alone, atol=1e-3)


def test_a_mutual_branch_has_the_sources_content_in_the_targets_layout(few_step_parts, latents):
    method = InfEdit(few_step_parts)
    inversion = method.invert_latents(latents, SOURCE, seed=1)
    own = method.attention_control(CONTROL, inversion, TARGET).rows
    early, late = own(7), own(8)
    assert early.query.tolist() == early.key.tolist() == [0, 1, 0, 1]
    assert early.value is None
    source, target = [0, 1], [4, 5]
    assert late.query.tolist() == source + target + target
    assert late.key.tolist() == late.value.tolist() == source + source + target


def test_unconditional_rows_have_their_own_mutual_branch(parts, latents):
    """Where both halves of a batch are the same, self-attention between branches keeps them so."""
    method = InfEdit(parts)
    inversion = method.invert_latents(latents, SOURCE, seed=1)
    control = PromptToPrompt(cross_replace=0, self_replace=0, blend=False)
    x = torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    told = parts.conditioner([*SOURCE, *SOURCE, *TARGET]).repeat(2)
    with torch.no_grad(), method.attention_control(control, inversion, TARGET).attached(parts.model.network):
        unconditional, conditional = parts.eps(x, 500, told).chunk(2)
    close(unconditional, conditional)
    with torch.no_grad():
        free = parts.eps(x[:6], 500, told[:6])
    assert not torch.allclose(free[2:], conditional[2:], atol=1e-3)


def test_an_lcm_is_told_no_w_and_guided_by_a_second_evaluation(layouts, tmp_path):
    """As InfEdit's authors run it, with unconditional rows for every branch."""
    folder = shutil.copytree(layouts["sd15"], tmp_path / "lcm", ignore=shutil.ignore_patterns("unet_guided"))
    lcm = UNet2DConditionModel.from_pretrained(layouts["sd15"] / "unet_guided")
    assert lcm.config.time_cond_proj_dim
    lcm.save_pretrained(folder / "unet")
    method, calls = build("infedit", Family(str(folder)), num_inference_steps=4), []

    def note(module, args, kwargs) -> None:
        calls.append((len(args[0]), kwargs["timestep_cond"]))

    hook, steps = method.parts.model.network.register_forward_pre_hook(note, with_kwargs=True), list[Step]()
    method.edit(torch.zeros(1, 3, 64, 64), ["a red cat"], ["a red dog"], on_step=steps.append)
    hook.remove()
    assert [rows for rows, _ in calls] == [4, 4, 6, 6]  # two branches, then three
    assert all(embedding is None for _, embedding in calls)
    assert sum(step.nfe for step in steps) == 20


def test_what_is_not_changed_is_the_mutual_branch(few_step_parts, latents):
    method = InfEdit(few_step_parts)
    inversion, last = method.invert_latents(latents, SOURCE, seed=1), len(method.steps) - 1

    def decode(**settings) -> list[torch.Tensor]:
        steps = list[Step]()
        told = {"guidance": GUIDED, "control": replace(CONTROL, **settings)}
        method.generate_latents(TARGET, inversion, on_step=steps.append, **told)
        return [(step.x[-4:-2] - step.x[-2:]).abs().amax(dim=1).flatten(1) for step in steps]

    vague = [index for index, (t, _) in enumerate(method.steps) if method.process.alpha(t) < BLUR]
    for index, apart in enumerate(decode(blend_threshold=0.999)):  # random attention is all but the same everywhere
        kept = (apart == 0).float().mean(dim=1)
        if index in (0, last):
            assert (kept == 0).all()  # nothing is blended
        elif index in vague:
            assert (kept == 1).all()
        else:
            assert ((kept > 0) & (kept < 1)).all()
    assert vague == [0, 1]
    for apart in (*decode(blend=False), *decode(blend_from=1.0)):
        assert (apart > 0).any(dim=1).all()


# Negative-prompt inversion


def test_a_network_without_a_place_for_the_negative_prompt_is_refused(few_step_parts):
    with pytest.raises(ValueError, match="needs a network without guidance embedding"):
        NegativePromptInversion(few_step_parts)


# SDEdit


def test_strength_from_nothing_to_all(parts, latents):
    kept = SDEdit(parts, num_inference_steps=4, strength=0.0)
    assert torch.equal(kept.generate_latents(TARGET, kept.invert_latents(latents, SOURCE), guidance=GUIDED), latents)
    assert not kept.steps
    free = SDEdit(parts, num_inference_steps=4, strength=1.0)
    results = [
        free.generate_latents(TARGET, free.invert_latents(x0, SOURCE, seed=2), guidance=GUIDED)
        for x0 in (latents, 3 - latents)
    ]
    assert torch.equal(*results)
    half = SDEdit(parts, num_inference_steps=4, strength=0.5)
    assert [t for t, _ in half.steps] == [250, 0]
    results = [
        half.generate_latents(TARGET, half.invert_latents(x0, SOURCE, seed=2), guidance=GUIDED)
        for x0 in (latents, 3 - latents)
    ]
    assert not torch.allclose(*results, atol=0.1)
    with pytest.raises(ValueError, match=r"strength 1.5 must lie between 0"):
        SDEdit(parts, strength=1.5)


# ReNoise

PLAIN = {"regularization": None, "correction": 0.0}


def renoise(parts: Parts, count: int, sampler: Sampler, **settings) -> ReNoise:
    """Of which each step takes the last of its predictions."""
    last = (count, count + 1)
    return ReNoise(parts, sampler=sampler, renoising=Renoising(count, last, count, last), **{**PLAIN, **settings})


@pytest.mark.parametrize("sampler", [Sampler("ddim", 5), Sampler("jumps", 2, (499, 999))], ids=lambda s: s.kind)
def test_more_renoisings_leave_less_error(process, latents, sampler):
    """On Gaussian data, whose steps are linear and contract: less with each, down to rounding."""
    gaussian = analytic_parts(Gaussian(0.5, 0.6, process), process)
    errors = []
    for count in (0, 1, 2, 4, 8, 16):
        method = renoise(gaussian, count, sampler)
        inversion = method.invert_latents(latents, ["source"] * 2)
        back = method.generate_latents(["source"] * 2, inversion, guidance=UNGUIDED)
        errors.append(float((back - latents).abs().max()))
    assert all(later < max(0.95 * earlier, 1e-4) for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.3 * errors[0], errors


def test_no_renoising_is_ddim_inversion(process, latents):
    gaussian = Gaussian(0.5, 0.6, process)
    method = renoise(analytic_parts(gaussian, process), 0, Sampler("ddim", 5))
    inverted = method.invert_latents(latents, ["source"] * 2).noise
    close(inverted, ddim_invert(gaussian, latents, ddim_timesteps(5), process), atol=1e-5)


@pytest.mark.parametrize("kind", ["ancestral", "lcm"])
def test_corrected_noise_brings_all_but_the_last_step_back(process, latents, kind):
    """However few re-noisings: a correction without limit leaves the error of the step that draws nothing."""
    gaussian = analytic_parts(Gaussian(0.5, 0.6, process), process)
    method = renoise(gaussian, 1, Sampler(kind, 4), correction=math.inf)
    up, down = list[Step](), list[Step]()
    inversion = method.invert_latents(latents, ["source"] * 2, on_step=up.append)
    method.generate_latents(["source"] * 2, inversion, guidance=UNGUIDED, on_step=down.append)
    for falling, rising in zip(down[:-1], up[:-1][::-1], strict=True):
        close(falling.x, rising.x, atol=1e-3)
    uncorrected = renoise(gaussian, 1, Sampler(kind, 4))
    drawn = uncorrected.invert_latents(latents, ["source"] * 2).per_step
    limited = renoise(gaussian, 1, Sampler(kind, 4), correction=0.5)
    moved = limited.invert_latents(latents, ["source"] * 2).per_step
    lengths = [float((a - b).flatten(1).norm(dim=1).max()) for a, b in zip(drawn, moved, strict=True)]
    assert max(lengths) <= 0.5 + 1e-4
    assert max(lengths) > 0.4


def test_published_evaluations(parts, latents):
    """44 calls for Turbo and 150 for SDXL, a second sample riding along where it regularises; 35 for an LCM."""
    published = {"renoise_turbo": (44, 44 + 4), "renoise_sdxl": (150, 150 + 13), "renoise_lcm": (35, 35)}
    for name, expected in published.items():
        method, calls, steps = ReNoise(parts, **typed(ReNoise, METHODS.find(name).init_args, skip={"parts"})), [], []
        hook = method.network.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(len(args[0])))
        inversion = method.invert_latents(latents[:1], SOURCE[:1], on_step=steps.append)
        method.generate_latents(TARGET[:1], inversion, guidance=method.guidance, on_step=steps.append)
        hook.remove()
        assert (len(calls), sum(calls)) == expected
        assert sum(step.nfe for step in steps) == sum(calls)


def test_predictions_are_regularised_where_they_are_averaged(parts, latents):
    """As in the authors' example of SDXL, whose one re-noising never comes to predictions 8 and 9."""
    settings = typed(ReNoise, METHODS.find("renoise_sdxl").init_args, skip={"parts"})
    method, rows = ReNoise(parts, **{**settings, "sampler": Sampler("ddim", 4)}), []
    hook = parts.model.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    method.invert_latents(latents[:1], SOURCE[:1])
    hook.remove()
    assert rows == [2, 1] + [1, 1] * 3  # t = 0, then 250, 500 and 750


def test_regularization_makes_noise_of_what_is_none():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 4, 64, 64, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(2, 4, 66, 66, generator=generator), 3, 1) * 2
    rolls = [torch.Generator().manual_seed(i) for i in range(2)]
    only_rolls = Regularization(rounds=20, patch_weight=0.0)(smooth, reference, rolls)
    near = [[1, 1, 1, 1]] * 2
    assert (auto_correlation(only_rolls, near) < 0.9 * auto_correlation(smooth, near)).all()
    only_patches = Regularization(correlation_weight=0.0)(smooth, reference, [torch.Generator()] * 2)
    assert (patch_divergence(only_patches, reference) < patch_divergence(smooth, reference)).all()


def test_statistics_by_hand():
    x = torch.tensor([[1.0, -1.0], [2.0, 0.0]]).view(1, 1, 2, 2)
    # rolled by 1 along either side of two: rows (2, 0), (1, -1) and columns (-1, 1), (0, 2)
    expected = ((2 + 0 + 2 + 0) / 4) ** 2 + ((-1 - 1 + 0 + 0) / 4) ** 2
    torch.testing.assert_close(auto_correlation(x, [[1]]), torch.tensor([expected]))
    patch, other = torch.arange(16.0).view(1, 1, 4, 4), 2 * torch.arange(16.0).view(1, 1, 4, 4) + 1
    mean, var, other_mean, other_var = patch.mean(), patch.var(), other.mean(), other.var()
    divergence = (other_var / var).log() + (var + (mean - other_mean) ** 2) / other_var - 1
    torch.testing.assert_close(patch_divergence(patch, other), divergence.abs()[None], rtol=1e-4, atol=1e-5)
    assert patch_divergence(patch, patch) < 1e-5
    small = patch[..., :3, :2]  # narrower than a patch: patches of 2 x 2, of which the third row makes none
    torch.testing.assert_close(patch_divergence(small, small + 1), patch_divergence(small, small + 1, size=2))
    assert patch_divergence(patch[..., :1, :1], other[..., :1, :1]) == 0


def test_a_sampler_that_draws_nothing_has_no_noise_to_correct(parts):
    with pytest.raises(ValueError, match="a ddim sampler draws no noise that could be corrected"):
        ReNoise(parts, sampler=Sampler("ddim", 4))
