"""What the baselines of flow models are for, on data whose velocity is known and on networks of random weights."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from analytic import Gaussian
from baselines_case import analytic_parts
from diffusers import FlowMatchEulerDiscreteScheduler

from icd_lightning.diffusion import VP, Flow, Step, StepGuidance, ddim_generate, ddim_invert, ddim_timesteps
from icd_lightning.editing.baselines.fireflow import FireFlow
from icd_lightning.editing.baselines.flowedit import FlowEdit
from icd_lightning.editing.baselines.infedit import InfEdit
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.baselines.rf_inversion import RFInversion
from icd_lightning.editing.baselines.rf_solver_edit import RFSolverEdit
from icd_lightning.editing.baselines.uniedit_flow import UniEditFlow
from icd_lightning.editing.limits import Injection
from icd_lightning.editing.methods import OTHERS, build, class_of
from icd_lightning.evaluation.methods import all_methods
from icd_lightning.models.family import Family

SOURCE, TARGET = ["a large red circle", "a small blue square"], ["a large blue circle", "a small star"]
SAME = ["source"] * 2
UNGUIDED = StepGuidance(1.0)


@pytest.fixture(scope="module")
def family(flow_layouts) -> Family:
    return Family(str(flow_layouts["flux"]))


@pytest.fixture(scope="module")
def parts(family) -> Parts:
    return Parts.load(family)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_grid_is_diffusers(shift, parts):
    scheduler, process = FlowMatchEulerDiscreteScheduler(shift=shift), Flow(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    method = FlowEdit(analytic_parts(Gaussian(0.5, 0.6, process), process), num_inference_steps=8, skip=0)
    times = [*(t for t, _ in method.steps), 0]
    close(torch.cat([process.sigma(t).flatten() for t in times]), scheduler.sigmas, atol=1e-6)


def returned(method, latents: torch.Tensor) -> float:
    """How far latents end from where they began, up and down, unguided."""
    inversion = method.invert_latents(latents, SAME)
    return float((method.generate_latents(SAME, inversion, guidance=UNGUIDED) - latents).abs().max())


@pytest.mark.parametrize(("cls", "order"), [(RFSolverEdit, 2), (FireFlow, 2), (UniEditFlow, 1)])
def test_twice_the_steps_bring_a_picture_back_one_order_better_than_they_solve(latents, cls, order):
    """The way back undoes the greatest part of the error: DDIM's, which does not look ahead, only halves."""
    process = Flow(num_train_timesteps=8000)  # where the table's rounding of midpoints is small
    gaussian = analytic_parts(Gaussian(0.5, 0.6, process), process)
    options = {"strength": 1.0, "omega": 0.0} if cls is UniEditFlow else {}
    errors = [returned(cls(gaussian, num_inference_steps=count, **options), latents) for count in (10, 20, 40)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 0.9 * 2 ** (order + 1), errors


def test_ddim_is_eulers_method_on_a_flow(latents):
    """Its steps down are Euler's; its way up asks at each step's end, with an error of first order."""
    process = Flow(shift=3.0)
    denoise = Gaussian(0.5, 0.6, process)
    x = expected = latents
    grid = ddim_timesteps(20)
    steps = list[Step]()
    ddim_generate(denoise, x, grid, process, on_step=steps.append)
    for t, s in pairwise(grid[::-1]):
        velocity = process.velocity(denoise(expected, torch.tensor([t])))
        expected = expected + (process.sigmas[s] - process.sigmas[t]) * velocity
    close(steps[-2].x, expected)
    errors = []
    for count in (25, 50, 100):
        grid = ddim_timesteps(count)
        errors.append((ddim_generate(denoise, ddim_invert(denoise, x, grid, process), grid, process) - x).abs().max())
    assert all(1.5 < coarse / fine < 3 for coarse, fine in pairwise(errors)), errors


def test_flowedit_to_the_same_prompt_under_the_same_guidance_is_the_picture(parts, latents):
    for skip in (0, 3):
        method, steps = FlowEdit(parts, num_inference_steps=6, skip=skip, source_guidance_scale=3.0), list[Step]()
        inversion = method.invert_latents(latents, SOURCE, seed=1)
        told = {"guidance": StepGuidance(3.0), "on_step": steps.append}
        close(method.generate_latents(SOURCE, inversion, **told), latents, atol=1e-6)
        assert sum(step.nfe for step in steps) == 2 * (6 - skip)
        assert not torch.allclose(method.generate_latents(TARGET, inversion), latents, atol=1e-3)


def test_flowedit_over_several_noises_edits_each_picture_as_alone(parts, latents):
    method, steps = FlowEdit(parts, num_inference_steps=4, skip=2, num_noises=3), list[Step]()
    inversion = method.invert_latents(latents, SOURCE, seed=1)
    both = method.generate_latents(TARGET, inversion, on_step=steps.append)
    alone = method.invert_latents(latents[1:], SOURCE[1:], seed=2)
    close(method.generate_latents(TARGET[1:], alone), both[1:])
    assert sum(step.nfe for step in steps) == 2 * 3 * (4 - 2)
    with pytest.raises(ValueError, match="num_noises 3 borrow no attention: take 1, or leave out the control"):
        method.generate_latents(TARGET, inversion, control=Injection())
    with pytest.raises(ValueError, match="num_noises 0 must be 1 or more"):
        FlowEdit(parts, num_noises=0)


@pytest.mark.parametrize("skip", [-1, 6])
def test_skipping_all_is_refused(parts, skip):
    with pytest.raises(ValueError, match=f"skip {skip} must be 0 or more and less than num_inference_steps 6"):
        FlowEdit(parts, num_inference_steps=6, skip=skip)


def test_controllers_lead_to_noise_and_picture(parts, latents):
    drawn = RFInversion(parts, num_inference_steps=4, gamma=1.0).invert_latents(latents, SOURCE, seed=3).noise
    noise = RFInversion(parts, num_inference_steps=1, gamma=1.0).invert_latents(latents, SOURCE, seed=3).noise
    close(drawn, noise, atol=1e-5)  # straight there, whatever the network says
    for eta, controlled, exact in ((1.0, 1.0, True), (0.5, 1.0, False), (1.0, 0.5, False)):
        method = RFInversion(parts, num_inference_steps=4, eta=eta, controlled=controlled)
        edited = method.generate_latents(TARGET, method.invert_latents(latents, SOURCE))
        assert torch.allclose(edited, latents, atol=1e-5) == exact
    with pytest.raises(ValueError, match=r"gamma nan is no fraction: choose between 0 and 1"):
        RFInversion(parts, gamma=float("nan"))


def test_uniedit_flow_adds_nothing_where_prompts_agree(parts, latents):
    """Then its mask is of nothing, and omega has no effect; both end where plain steps do."""
    ends = []
    for omega in (0.0, 5.0):
        method = UniEditFlow(parts, num_inference_steps=6, omega=omega)
        ends.append(method.generate_latents(SOURCE, method.invert_latents(latents, SOURCE)))
    assert ends[0].isfinite().all()
    close(*ends)
    kept = UniEditFlow(parts, strength=0.0)
    assert torch.equal(kept.generate_latents(TARGET, kept.invert_latents(latents, SOURCE)), latents)
    for strength, up, down in ((0.5, 6, 10), (1.0, 11, 20)):
        method, steps = UniEditFlow(parts, num_inference_steps=10, strength=strength), list[Step]()
        inversion = method.invert_latents(latents, SOURCE, on_step=steps.append)
        assert sum(step.nfe for step in steps) == up
        method.generate_latents(TARGET, inversion, on_step=steps.append)
        assert sum(step.nfe for step in steps) == up + down


def test_evaluations_of_solvers(parts, latents):
    for cls, one_way in ((RFSolverEdit, 10), (FireFlow, 6)):
        method, steps = cls(parts, num_inference_steps=5), list[Step]()
        inversion = method.invert_latents(latents, SOURCE, on_step=steps.append)
        assert sum(step.nfe for step in steps) == one_way
        method.generate_latents(TARGET, inversion, on_step=steps.append)
        assert sum(step.nfe for step in steps) == 2 * one_way


# Which methods suit which process


def test_methods_are_left_out_where_the_process_does_not_suit_them(family, random_family, caplog):
    flows = {"flowedit", "rf_solver_edit", "fireflow", "rf_inversion", "uniedit_flow"}
    there, here = set(all_methods(family)), set(all_methods(Family(str(random_family))))
    assert flows <= there
    assert not flows & here
    assert {"ddim", "ddim_dynamic", "sdedit", "icd"} <= there & here
    assert set(OTHERS) - flows - {"ddim", "ddim_dynamic", "sdedit"} <= here - there
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 2
    assert f"left out, since the process of {family.model} is Flow: ddim_p2p, nti" in said[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flowedit", "FlowEdit needs a model whose process is a flow, as FLUX.1 and SD3 are, and this one's is VP"),
        ("nti", "NullTextInversion needs a model whose process is VP, as SD1.5, SDXL and tiny are, and this one's is "),
    ],
)
def test_a_method_that_the_process_does_not_suit_is_refused_before_weights_are_read(
    name, message, family, random_family, monkeypatch
):
    unsuited = Family(str(random_family)) if name == "flowedit" else family
    monkeypatch.setattr(Family, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        build(name, unsuited)
    assert class_of(name)


def test_a_method_made_by_hand_is_refused_too(parts):
    process = VP()
    with pytest.raises(ValueError, match="FireFlow needs a model whose process is a flow"):
        FireFlow(analytic_parts(Gaussian(0.0, 1.0, process), process))
    with pytest.raises(ValueError, match="InfEdit needs a model whose process is VP"):
        InfEdit(parts)
