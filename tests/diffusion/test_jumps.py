from itertools import pairwise

import pytest
import torch
from analytic import Gaussian, PointMass
from torch import Tensor

from icd_lightning.diffusion import (
    Boundaries,
    DDIMJump,
    Flow,
    Process,
    Split,
    Step,
    ddim_generate,
    ddim_invert,
    ddim_timesteps,
    falling,
    generate,
    invert,
    lcm_timesteps,
    run_jumps,
    trailing_timesteps,
)

each_cut = pytest.mark.parametrize("num_segments", [1, 2, 3, 4, 8])


@pytest.fixture
def noise(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=generator)


@pytest.fixture
def point_mass(process: Process, generator: torch.Generator) -> PointMass:
    return PointMass(torch.randn(4, 8, 8, generator=generator), process)


@pytest.fixture
def jump(point_mass: PointMass, process: Process) -> DDIMJump:
    return DDIMJump(point_mass, process)


@each_cut
def test_point_mass_inverts_to_its_own_noise_and_back(process, noise, point_mass, jump, num_segments: int):
    boundaries = Boundaries.uniform(num_segments)
    x0 = point_mass.x0.expand_as(noise)
    inverted = invert(jump, x0, noise, boundaries, process)
    torch.testing.assert_close(inverted, process.add_noise(x0, noise, 999), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(generate(jump, inverted, boundaries), x0, rtol=1e-4, atol=1e-4)


@each_cut
def test_generate_then_invert_is_the_identity_on_noise(process, noise, point_mass, jump, num_segments: int):
    """Up to start_timestep, where inversion begins with a noise of its own: given the same noise, it finds it again."""
    boundaries = Boundaries.uniform(num_segments)
    x0 = generate(jump, process.add_noise(point_mass.x0, noise, 999), boundaries)
    again = invert(jump, x0, noise, boundaries, process)
    torch.testing.assert_close(again, process.add_noise(point_mass.x0, noise, 999), rtol=1e-4, atol=1e-4)


def test_steps_tell_the_path_and_its_cost(process, noise, point_mass):
    boundaries, steps = Boundaries.parse("259,519,779,999"), []
    asked: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Split:
        assert t.shape == (3,)
        assert t.dtype == torch.long
        asked.append(int(t[0]))
        return point_mass(x, t)

    jump = DDIMJump(denoise, process)
    x = generate(jump, noise, boundaries, on_step=steps.append)
    assert [(step.t, step.s) for step in steps] == list(boundaries.jumps["reverse"])
    assert asked == [999, 779, 519, 259]
    assert torch.equal(steps[-1].x, x)
    assert sum(step.nfe for step in steps) == 4
    invert(jump, x, noise, boundaries, process, on_step=steps.append)
    assert [(step.t, step.s) for step in steps[4:]] == list(boundaries.jumps["forward"])
    assert asked[4:] == [19, 259, 519, 779]
    assert sum(step.nfe for step in steps) == 8


def test_a_jump_counts_what_its_denoiser_takes(process, noise, point_mass):
    steps: list[Step] = []

    def twice(x: Tensor, t: Tensor) -> Split:
        return point_mass(x, t)

    twice.nfe = 2
    generate(DDIMJump(twice, process), noise, Boundaries.uniform(3), on_step=steps.append)
    assert sum(step.nfe for step in steps) == 6
    steps.clear()
    ddim_generate(twice, noise, ddim_timesteps(10), process, on_step=steps.append)
    assert sum(step.nfe for step in steps) == 20


def test_latents_stay_float32_around_a_half_precision_network(process, noise):
    half = DDIMJump(lambda x, t: process.split(x.bfloat16() * 0.5, x, t), process)
    x = generate(half, noise.bfloat16(), Boundaries.uniform(4))
    assert x.dtype == torch.float32


def test_only_run_jumps_builds_a_graph(process, noise, point_mass, jump):
    noise.requires_grad_()
    boundaries = Boundaries.uniform(4)
    assert not generate(jump, noise, boundaries).requires_grad
    assert not invert(jump, noise, noise, boundaries, process).requires_grad
    assert not ddim_invert(point_mass, noise, ddim_timesteps(5), process).requires_grad
    assert run_jumps(jump, noise, [(999, 19)]).requires_grad


def test_ddim_grid():
    assert ddim_timesteps(50) == tuple(range(0, 1000, 20))
    assert ddim_timesteps(3) == (0, 333, 666)
    with pytest.raises(ValueError, match="num_inference_steps 0 must lie between 1 and 1000"):
        ddim_timesteps(0)


@pytest.mark.parametrize("num_steps", [1, 4, 7, 12, 50])
def test_grids_of_turbo_and_lcm_are_diffusers(num_steps: int):
    from diffusers import DDIMScheduler, LCMScheduler

    trailing, lcm = DDIMScheduler(timestep_spacing="trailing"), LCMScheduler()
    for theirs in (trailing, lcm):
        theirs.set_timesteps(num_steps)
    assert trailing_timesteps(num_steps) == tuple(trailing.timesteps.flip(0).tolist())
    assert lcm_timesteps(num_steps, range(19, 1000, 20)) == tuple(lcm.timesteps.flip(0).tolist())
    with pytest.raises(ValueError, match="num_inference_steps 51 must lie between 1 and 50"):
        lcm_timesteps(51, range(19, 1000, 20))


def test_falling_steps_end_at_zero():
    assert falling((0, 20, 40)) == [(40, 20), (20, 0), (0, 0)]
    assert falling((259, 999)) == [(999, 259), (259, 0)]


@pytest.mark.parametrize("timesteps", [ddim_timesteps(50), Boundaries.uniform(4).solver_timesteps])
def test_ddim_asks_at_the_noisier_end_of_each_step_both_ways(process, noise, timesteps: tuple[int, ...]):
    asked: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Split:
        asked.append(int(t[0]))
        return process.split(0.1 * x, x, t)

    ddim_invert(denoise, noise, timesteps, process)
    assert asked == list(timesteps)
    asked.clear()
    ddim_generate(denoise, noise, timesteps, process)
    assert asked == list(timesteps[::-1])


def test_ddim_is_exact_on_a_point_mass(process, noise, point_mass):
    for num_steps in (1, 5, 50):
        timesteps = ddim_timesteps(num_steps)
        x_T = process.add_noise(point_mass.x0, noise, timesteps[-1])  # noqa: N806
        x = ddim_generate(point_mass, x_T, timesteps, process)
        torch.testing.assert_close(x, process.add_noise(point_mass.x0, noise, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("run", "backwards"), [(ddim_generate, True), (ddim_invert, False)])
def test_ddim_errors_shrink_with_the_grid_on_gaussian_data(process, noise, run, backwards: bool):
    """First order: against the exact flow, ten times the steps leave about a tenth of the error."""
    gaussian = Gaussian(mean=0.5, std=0.3, process=process)

    def error(num_steps: int) -> float:
        timesteps = tuple(range(1000 // num_steps - 1, 1000, 1000 // num_steps))
        ends = (999, 0) if backwards else (0, 999)
        start = noise.double() if backwards else (0.5 + 0.3 * noise).double()
        return float((run(gaussian, start, timesteps, process) - gaussian.transport(start, *ends)).abs().mean())

    errors = [error(n) for n in (5, 10, 20, 50, 100, 200, 500)]
    assert all(finer < 0.75 * coarser for coarser, finer in pairwise(errors)), errors
    assert errors[-1] < 0.02 * errors[0], errors


def test_ddim_reconstruction_improves_with_the_grid_on_gaussian_data(process, noise):
    gaussian = Gaussian(mean=0.5, std=0.3, process=process)
    x0 = 0.5 + 0.3 * noise

    def error(num_steps: int) -> float:
        timesteps = ddim_timesteps(num_steps)
        x_T = ddim_invert(gaussian, x0, timesteps, process)  # noqa: N806
        return float((ddim_generate(gaussian, x_T, timesteps, process) - x0).abs().mean())

    errors = [error(n) for n in (5, 10, 50, 250)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_a_flow_samples_from_noise_alone(noise):
    """Its first step begins where alpha is 0: the network's own x0 is taken, nothing is divided by 0."""
    flow, data = Flow(shift=3.0), torch.linspace(-1, 1, 256).view(4, 8, 8)

    def true_velocity(x: Tensor, t: Tensor) -> Split:
        sigma = flow.sigma(t, set_alpha_to_one=False)
        return flow.split((x - data) / sigma, x, t)

    x = ddim_generate(true_velocity, noise, trailing_timesteps(4), flow)
    torch.testing.assert_close(x, flow.add_noise(data, noise, 0), rtol=1e-4, atol=1e-5)


def test_a_jump_from_outside_says_how_many_evaluations_it_took():
    def jump(x, t, s):
        return x

    jump.nfe = 3
    steps: list[Step] = []
    run_jumps(jump, torch.zeros(1, 1, 2, 2), [(999, 499), (499, 0)], on_step=steps.append)
    assert [step.nfe for step in steps] == [3, 3]
