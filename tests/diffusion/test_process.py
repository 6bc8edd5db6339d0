import json
from itertools import pairwise
from math import exp

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from icd_lightning.diffusion import VP, DDIMJump, Flow, NoisedData, Process

FLOW = "FlowMatchEulerDiscreteScheduler"
TIMESTEPS = torch.tensor([0, 19, 259, 699, 999])


@pytest.fixture
def x0(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(5, 4, 8, 8, generator=generator)


@pytest.fixture
def noise(generator: torch.Generator, x0: torch.Tensor) -> torch.Tensor:
    return torch.randn(x0.shape, generator=generator)


def test_variance_is_preserved(process: VP):
    t = torch.arange(1000)
    total = process.alpha(t) ** 2 + process.sigma(t) ** 2
    assert total.shape == (1000, 1, 1, 1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_zero_is_data_for_a_jump_and_the_first_row_for_a_network(process: VP):
    assert process.alpha(0).item() == 1
    assert process.sigma(0).item() == 0
    assert process.alpha(0, set_alpha_to_one=False) == process.alphas[0]
    assert 0.02 < process.sigma(0, set_alpha_to_one=False).item() < 0.04


def test_int_and_tensor_timesteps_agree(process: VP, x0, noise):
    t = torch.full((5,), 259)
    assert torch.equal(process.add_noise(x0, noise, 259), process.add_noise(x0, noise, t))
    assert torch.equal(process.ddim_step(x0, noise, 259, 0), process.ddim_step(x0, noise, t, torch.zeros_like(t)))


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
def test_betas_run_from_start_to_end(beta_schedule: str):
    process = VP(beta_schedule=beta_schedule, beta_start=0.001, beta_end=0.02)
    kept = process.alphas.double().square()
    betas = 1 - kept / torch.cat([torch.ones(1), kept[:-1]])
    middle = {"linear": 0.0105, "scaled_linear": ((0.001**0.5 + 0.02**0.5) / 2) ** 2}[beta_schedule]
    expected = torch.tensor([0.001, middle, 0.02], dtype=torch.float64)
    torch.testing.assert_close(betas[[0, 500, 999]], expected, rtol=5e-3, atol=1e-6)


PROCESSES = {"eps": VP(), "v": VP(prediction_type="v_prediction"), "flow": Flow(), "shifted flow": Flow(shift=3.0)}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@each_process
def test_conversions_are_mutual_inverses(process: Process, x0, noise):
    x = process.add_noise(x0, noise, TIMESTEPS)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(process.eps_from_x0(x, x0, TIMESTEPS), noise, rtol=1e-3, atol=1e-3)
    target = process.target(x0, noise, TIMESTEPS)
    split = process.split(target, x, TIMESTEPS)
    torch.testing.assert_close(split.eps, noise, **close)
    torch.testing.assert_close(split.x0, x0, **close)
    torch.testing.assert_close(process.target(*split, TIMESTEPS), target, **close)


def test_v_prediction_moves_x_as_eps_prediction_does(x0, noise):
    by_eps, by_v = VP(), VP(prediction_type="v_prediction")
    x, s = by_eps.add_noise(x0, noise, TIMESTEPS), torch.tensor([19, 0, 519, 259, 979])
    assert torch.equal(by_eps.target(x0, noise, TIMESTEPS), noise)
    velocity = by_v.target(x0, noise, TIMESTEPS)
    assert not torch.allclose(velocity, noise, atol=0.1)
    steps = [
        process.mix(*process.split(output, x, TIMESTEPS), s) for process, output in ((by_eps, noise), (by_v, velocity))
    ]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_there_and_back_at_fixed_eps_is_the_identity(process: VP, set_alpha_to_one: bool, x0, noise):
    for s in TIMESTEPS.roll(2), torch.zeros_like(TIMESTEPS), torch.full_like(TIMESTEPS, 999):
        away = process.ddim_step(x0, noise, TIMESTEPS, s, set_alpha_to_one=set_alpha_to_one)
        back = process.ddim_step(away, noise, s, TIMESTEPS, set_alpha_to_one=set_alpha_to_one)
        torch.testing.assert_close(back, x0, rtol=1e-4, atol=1e-5)


def test_staying_changes_nothing_but_rounding(process: VP, x0, noise):
    stayed = process.ddim_step(x0, noise, TIMESTEPS, TIMESTEPS)
    torch.testing.assert_close(stayed, x0, rtol=1e-6, atol=1e-6)
    assert torch.equal(stayed[0], x0[0]), "data is data"


def test_two_steps_at_fixed_eps_are_one(process: VP, x0, noise):
    by_way = process.ddim_step(process.ddim_step(x0, noise, 999, 519), noise, 519, 0)
    torch.testing.assert_close(by_way, process.ddim_step(x0, noise, 999, 0), rtol=1e-4, atol=1e-4)


def test_the_true_noise_leads_exactly_to_the_data(process: VP, x0, noise):
    x = NoisedData(x0, noise, process).at(TIMESTEPS[1:].repeat(2)[:5])
    t = TIMESTEPS[1:].repeat(2)[:5]
    torch.testing.assert_close(process.ddim_step(x, noise, t, 0), x0, rtol=1e-4, atol=1e-5)


def test_arithmetic_stays_float32_for_half_precision_networks(x0, noise):
    module = nn.Module()
    module.process = VP()
    exact = module.process.alphas.clone()
    module.to(torch.bfloat16)
    assert torch.equal(module.process.alphas, exact)
    x, eps = x0.bfloat16(), noise.bfloat16()
    for step in (
        module.process.ddim_step(x, eps, 999, 979),
        module.process.ddim_step(x, eps, TIMESTEPS, 0),
        module.process.add_noise(x, eps, 19),
    ):
        assert step.dtype == torch.float32
    assert module.process.ddim_step(x0.double(), noise.double(), 999, 979).dtype == torch.float64


def test_the_table_is_no_part_of_a_checkpoint(process: VP):
    assert not process.state_dict()


def test_from_config_reads_what_diffusers_writes():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction")
    ours = Process.from_config(theirs.config)
    assert torch.equal(ours.alphas, theirs.alphas_cumprod.sqrt())
    assert ours.prediction_type == "v_prediction"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_solver_step_is_diffusers(prediction_type: str, x0, noise):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    theirs.set_timesteps(50)
    ours = Process.from_config(theirs.config)
    for t in (980, 500, 20, 0):
        stepped = ours.mix(*ours.split(noise, x0, t), max(t - 20, 0), set_alpha_to_one=False)
        torch.testing.assert_close(stepped, theirs.step(noise, t, x0).prev_sample, rtol=1e-5, atol=1e-5)
    t = torch.tensor([0, 19, 259, 699, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    by_v = VP(prediction_type="v_prediction")
    torch.testing.assert_close(by_v.target(x0, noise, t), theirs.get_velocity(x0, noise, t))


@pytest.mark.parametrize("t", [980, 500, 20])
def test_a_step_that_draws_noise_is_diffusers(process: VP, t: int, x0, noise):
    """DDIM at eta 1, which is DDPM; Euler ancestral, in its own variables, is the same step; and an LCM's."""
    from diffusers import DDIMScheduler, LCMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(50)
    eps, fresh, s = noise, noise.flip(0), t - 20
    std = process.posterior_std(t, s, set_alpha_to_one=False)
    mean = process.ddim_step(x0, eps, t, s, noise_std=std, set_alpha_to_one=False)
    expected = theirs.step(eps, t, x0, eta=1.0, variance_noise=fresh).prev_sample
    torch.testing.assert_close(mean + std * fresh, expected, rtol=1e-4, atol=1e-4)

    def spread(t: int) -> torch.Tensor:
        return process.sigma(t, set_alpha_to_one=False) / process.alpha(t, set_alpha_to_one=False)

    up = spread(s) * (1 - spread(s) ** 2 / spread(t) ** 2).sqrt()
    torch.testing.assert_close(std, process.alpha(s, set_alpha_to_one=False) * up)

    lcm = LCMScheduler(**betas)
    lcm.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    denoised_and_noised = lcm.step(eps, lcm.timesteps[0], x0, generator=generator).prev_sample
    first, second = (int(t) for t in lcm.timesteps[:2])
    std, drawn = process.sigma(second), torch.randn(x0.shape, generator=generator.manual_seed(0))
    ours = process.ddim_step(x0, eps, first, second, noise_std=std) + std * drawn
    torch.testing.assert_close(ours, denoised_and_noised, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_a_step_is_undone(process: VP, set_alpha_to_one: bool, x0, noise):
    option = {"set_alpha_to_one": set_alpha_to_one}
    for t, s in ((999, 749), (500, 480), (249, 0)):
        for std in (None, process.posterior_std(t, s, **option), process.sigma(s, **option)):
            below = process.ddim_step(x0, noise, t, s, noise_std=std, **option)
            data = process.x0_from_eps(below, noise, s, noise_std=std, **option)
            again = process.mix(data, noise, t, **option)
            torch.testing.assert_close(again, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "'squaredcos_cap_v2' is not supported; choose one of"),
        ({"prediction_type": "sample"}, "'sample' is not one of epsilon, v_prediction"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "got 0.5 and 0.1"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True of a scheduler is not supported by VP"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_start": float("nan")}, "got nan"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "'EDMEulerScheduler' is of no known process"),
        ({"shift": 3.0, "base_shift": 0.5}, "'with shift' is of no known process"),
        ({"_class_name": FLOW, "use_dynamic_shifting": True}, "use_dynamic_shifting=True of .* not supported by Flow"),
        ({"_class_name": FLOW, "shift_terminal": 0.1}, "shift_terminal=0.1 of a scheduler is not supported by Flow"),
        ({"_class_name": FLOW, "prediction_type": "epsilon"}, "prediction_type='epsilon' .* not supported by Flow"),
        ({"_class_name": FLOW, "shift": None}, "shift=None of a scheduler is not supported by Flow: .* a flow's shift"),
        ({"_class_name": FLOW, "shift": 0.0}, "shift 0.0 is out of range"),
        ({"num_train_timesteps": "x"}, "num_train_timesteps 'x' of a scheduler is no int"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0 is out of range"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000 is out of range"),
        ({"beta_start": True}, "beta_start True of a scheduler is no float"),
    ],
)
def test_a_schedule_that_cannot_be_had_is_refused(config: dict, message: str):
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with pytest.raises(ValueError, match=message):
        Process.from_config({**levels, **config})


@pytest.mark.parametrize("lost", ["beta_start", "beta_end", "beta_schedule"])
def test_levels_that_a_config_does_not_say_are_not_guessed(lost):
    config = {key: value for key, value in diffusers.DDIMScheduler().config.items() if key != lost}
    with pytest.raises(ValueError, match=f"does not say {lost}"):
        Process.from_config(config)


# --- a flow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_has_diffusers_levels_and_times(shift: float, x0, noise):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = Process.from_config(json.loads(theirs.to_json_string()))
    assert isinstance(flow, Flow)
    torch.testing.assert_close(flow.sigmas, theirs.sigmas.flip(0))
    torch.testing.assert_close(flow.network_time(TIMESTEPS), theirs.timesteps.flip(0)[TIMESTEPS])
    expected = theirs.scale_noise(x0, theirs.timesteps.flip(0)[TIMESTEPS], noise)
    torch.testing.assert_close(flow.add_noise(x0, noise, TIMESTEPS), expected)


def euler_by_diffusers(scheduler, velocity, noise, count: int, **options) -> torch.Tensor:
    """As the pipelines of FLUX and SD3 sample, from the sigmas of FLUX's."""
    scheduler.set_timesteps(sigmas=[(count - i) / count for i in range(count)], **options)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(
    ("config", "tokens", "shift"),
    [
        ({"shift": 3.0}, None, 3.0),
        ({"shift": 3.0, "use_dynamic_shifting": True}, 4096, exp(1.15)),
        ({"shift": 3.0, "use_dynamic_shifting": True}, 1024, exp(0.63)),
        ({"shift": 3.0, "use_dynamic_shifting": True, "time_shift_type": "linear"}, 256, 0.5),
    ],
    ids=["sd3", "flux at 1024 pixels", "flux at 512 pixels", "linear"],
)
def test_the_solver_steps_through_a_flow_as_diffusers_sampler_does(config, tokens, shift, noise):
    """SD3's fixed shift, and FLUX's by resolution: the same grid, the same times for the network, the same picture."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    flow = Process.from_config(json.loads(scheduler.to_json_string()), tokens)
    assert flow.settings["shift"] == pytest.approx(shift)
    torch.manual_seed(0)
    network, told = torch.nn.Conv2d(noise.shape[1], noise.shape[1], 3, padding=1), []

    def velocity(x, time):
        told.append(time)
        return network(x) * (1 + time.view(-1, 1, 1, 1) / 1000)

    count, options = 20, {} if tokens is None else {"mu": calculate_shift(tokens)}
    with torch.no_grad():
        theirs = euler_by_diffusers(scheduler, velocity, noise, count, **options)
        x, times = noise, told[:]
        for t, s in pairwise([*(1000 * (count - i) // count - 1 for i in range(count)), 0]):
            t = torch.full((len(x),), t)
            x = flow.mix(*flow.split(velocity(x, flow.network_time(t)), x, t), s)
    torch.testing.assert_close(torch.stack(told[count:]), torch.stack(times))
    torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)


def test_what_a_shift_by_resolution_cannot_be_computed_of_is_refused():
    config = {"_class_name": FLOW, "use_dynamic_shifting": True}
    for wrong in ({"base_shift": None}, {"max_image_seq_len": 256}, {"time_shift_type": "cubic"}):
        with pytest.raises(ValueError, match=r"a shift by resolution of .* cannot be computed: unset use_dynamic"):
            Process.from_config({**config, **wrong}, 4096)
    with pytest.raises(ValueError, match=r"shift .* is out of range"):
        Process.from_config({**config, "max_shift": 100.0}, 4096)


def test_a_flow_jumps_along_its_velocity(x0, noise):
    """x_s = x_t + (sigma_s - sigma_t) v, and at both ends without a division: the data itself, the noise itself."""
    flow, s = Flow(shift=3.0), torch.tensor([999, 0, 519, 259, 0])
    x = flow.add_noise(x0, noise, TIMESTEPS)
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    moved = flow.mix(*flow.split(output, x, TIMESTEPS), s, set_alpha_to_one=False)
    change = flow.sigma(s, set_alpha_to_one=False) - flow.sigma(TIMESTEPS, set_alpha_to_one=False)
    torch.testing.assert_close(moved, x + change * output, rtol=1e-4, atol=1e-5)
    true = flow.target(x0, noise, TIMESTEPS)
    torch.testing.assert_close(flow.mix(*flow.split(true, x, TIMESTEPS), 0), x0, rtol=1e-4, atol=1e-5)
    assert flow.sigma(999) == 1, "the last level is noise alone"
    torch.testing.assert_close(flow.mix(*flow.split(true, x, TIMESTEPS), 999), noise, rtol=1e-4, atol=1e-5)


@each_process
@pytest.mark.parametrize(("t", "s"), [(900, 500), (499, 249), (20, 5)])
def test_the_posterior_is_bayes(process: Process, t: int, s: int):
    """x_s given x_t and the data, where x_t = (alpha_t / alpha_s) x_s + fresh noise: precisions add up."""
    level = {"set_alpha_to_one": False}
    ratio = process.alpha(t, **level).double() / process.alpha(s, **level).double()
    fresh = process.sigma(t, **level).double() ** 2 - ratio**2 * process.sigma(s, **level).double() ** 2
    precision = 1 / process.sigma(s, **level).double() ** 2 + ratio**2 / fresh
    expected = precision.rsqrt().float()
    torch.testing.assert_close(process.posterior_std(t, s, **level), expected, rtol=1e-3, atol=1e-5)


@each_process
def test_a_jump_to_where_it_is_changes_nothing(process: Process, x0, noise):
    """Whatever the network says: the boundary condition of a consistency model."""
    jump = DDIMJump(lambda x, t: process.split(noise, x, t), process)
    assert torch.equal(jump(x0, TIMESTEPS, TIMESTEPS), x0)
    elsewhere = jump(x0, TIMESTEPS, TIMESTEPS.roll(1))
    assert not torch.isclose(elsewhere, x0).flatten(1).all(1).any()


class CosineFlow(Process):
    """A process of another package; such modules often begin with `from __future__ import annotations`."""

    schedulers = ("TheirScheduler",)

    def __init__(self, *, num_train_timesteps: "int" = 10, end: "float" = 1.0) -> None:
        angles = torch.linspace(0.01, end, num_train_timesteps)
        super().__init__(angles.cos(), angles.sin())

    def target(self, x0, noise, t):
        return noise

    def split(self, output, x, t):
        return self.split_by_eps(x, output, t)


def test_a_process_from_outside_is_known_by_its_scheduler():
    process = Process.from_config({"_class_name": "TheirScheduler", "num_train_timesteps": 20, "beta_start": 0.1})
    assert isinstance(process, CosineFlow)
    assert (process.num_train_timesteps, process.settings) == (20, {})
    with pytest.raises(ValueError, match="end 'far' of a scheduler is no float"):
        Process.from_config({"_class_name": "TheirScheduler", "end": "far"})
