from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from analytic import PointMass
from family_case import BOUNDARIES, write_students
from torch import Tensor

from icd_lightning.diffusion import Boundaries, Process, Split, StepGuidance
from icd_lightning.editing.consistency import AttentionControlled, InvertibleConsistency
from icd_lightning.editing.method import UNGUIDED, PromptSwap, seeded_noise
from icd_lightning.models.family import Family

SOURCES = ["a large red circle", "a small blue square", "a green ring on a plain white background", ""]
TARGETS = ["a large blue circle", "a small blue star", "a red ring on a plain white background", "a yellow star"]
GUIDED = StepGuidance(3.0, 0.8)


@pytest.fixture(scope="module")
def pipeline(random_family: Path) -> InvertibleConsistency:
    return InvertibleConsistency.from_pretrained(Family(str(random_family)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_samples_alone(pipeline, images):
    noise = pipeline.invert(images, SOURCES, seed=5)
    decoded = pipeline.generate(SOURCES, noise, guidance=GUIDED)
    edited = pipeline.edit(images, SOURCES, TARGETS, guidance=GUIDED, seed=5)
    for i in (0, 3):
        one, source, target = images[i : i + 1], SOURCES[i : i + 1], TARGETS[i : i + 1]
        close(pipeline.invert(one, source, seed=5 + i), noise[i : i + 1])
        close(pipeline.generate(source, noise[i : i + 1], guidance=GUIDED), decoded[i : i + 1])
        close(pipeline.edit(one, source, target, guidance=GUIDED, seed=5 + i), edited[i : i + 1])


def test_every_evaluation_is_counted_and_none_is_wasted(pipeline, images):
    batches, steps = [], []
    hook = pipeline.students.network.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    pipeline.edit(images, SOURCES, TARGETS, guidance=GUIDED, on_step=steps.append)
    hook.remove()
    assert [(step.t, step.s) for step in steps[:4]] == [(19, 259), (259, 519), (519, 779), (779, 999)]
    assert [(step.t, step.s) for step in steps[4:]] == [(999, 779), (779, 519), (519, 259), (259, 0)]
    assert sum(step.nfe for step in steps) == 8
    assert batches == [4] * 8  # no unconditional halves, no source branch beside the target's


def test_an_edit_by_attention_evaluates_its_source_too(pipeline, images):
    parts = (pipeline.students, pipeline.autoencoder, pipeline.conditioner, pipeline.boundaries)
    method, rows, steps = AttentionControlled(*parts), [], []
    hook = pipeline.students.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    method.edit(images, SOURCES, TARGETS, guidance=GUIDED, on_step=steps.append)
    hook.remove()
    assert sum(step.nfe for step in steps) == sum(rows) / len(images) == 12


def test_prompts_guidance_and_seed_matter_and_nothing_else_is_drawn(pipeline, images):
    noise = pipeline.invert(images, SOURCES)
    state = torch.get_rng_state()
    assert torch.equal(pipeline.invert(images, SOURCES, seed=0), noise)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(pipeline.invert(images, SOURCES, seed=4), noise)
    assert not torch.allclose(pipeline.invert(images, TARGETS), noise)
    plain = pipeline.generate(SOURCES, noise)
    assert torch.equal(pipeline.generate(SOURCES, noise, guidance=UNGUIDED), plain)
    assert not torch.allclose(pipeline.generate(SOURCES, noise, guidance=GUIDED), plain)
    assert not torch.allclose(pipeline.generate(TARGETS, noise), plain)


def test_an_edit_to_the_same_prompt_is_a_reconstruction(pipeline, images):
    again = pipeline.generate(SOURCES, pipeline.invert(images, SOURCES))
    close(pipeline.edit(images, SOURCES, SOURCES, guidance=UNGUIDED, swap_tau=0.5), again)


def test_a_swap_at_the_ends_is_no_swap(pipeline, images):
    noise = pipeline.invert(images, SOURCES)
    never = pipeline.edit(None, SOURCES, TARGETS, noise=noise, guidance=GUIDED, swap_tau=0.0)
    close(never, pipeline.generate(SOURCES, noise))
    at_once = pipeline.edit(None, SOURCES, TARGETS, noise=noise, guidance=GUIDED, swap_tau=1.0)
    close(at_once, pipeline.generate(TARGETS, noise, guidance=GUIDED))


@pytest.mark.parametrize(("tau", "switches_at"), [(1.0, 0), (0.8, 1), (0.779, 1), (0.7, 2), (0.0, 4)])
def test_the_source_prompt_is_followed_above_tau(tau, switches_at):
    asked = {"source": [], "target": []}

    def denoiser(name):
        return lambda x, t: asked[name].append(int(t[0])) or Split(x, x)

    swap, times = PromptSwap(denoiser("source"), denoiser("target"), tau), [999, 779, 519, 259]
    for t in times:
        swap(torch.zeros(2, 1, 1, 1), torch.full((2,), t))
    assert asked == {"source": times[:switches_at], "target": times[switches_at:]}


def test_a_swap_counts_the_evaluations_of_whoever_was_asked():
    @dataclass
    class Costly:
        nfe: int = 2

        def __call__(self, x: Tensor, t: Tensor) -> Split:
            return Split(x, x)

    swap, x = PromptSwap(lambda x, t: x, Costly(), 0.8), torch.zeros(1, 1, 1, 1)
    counted = [(swap(x, torch.tensor([t])), swap.nfe)[1] for t in (999, 779)]
    assert counted == [1, 2]


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan")])
def test_a_swap_outside_the_time_axis_is_refused(tau):
    with pytest.raises(ValueError, match="choose between 0 and 1"):
        PromptSwap(lambda x, t: x, lambda x, t: x, tau)


def test_noise_depends_on_seed_and_place_alone():
    noise = seeded_noise((3, 2, 4, 4), 7)
    assert noise.shape == (3, 2, 4, 4)
    for i in range(3):
        assert torch.equal(seeded_noise((1, 2, 4, 4), 7 + i)[0], noise[i])
    assert not torch.equal(noise[0], noise[1])
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed {seed} must be 0 or more"):
            seeded_noise((1, 2, 4, 4), seed)


@dataclass
class ExactStudents:
    """Students of data that are one point, where DDIM is exact."""

    x0: Tensor
    process: Process

    def denoiser(self, role, conditioning, guidance) -> PointMass:
        assert role == "reverse" or guidance == 1.0, "the forward model is trained unguided"
        return PointMass(self.x0, self.process)


@pytest.mark.parametrize("ends", ["999", "259,519,779,999"])
def test_exact_students_bring_back_what_the_autoencoder_does(pipeline, images, ends):
    one = images[:1]
    latents = pipeline.autoencoder.encode(one)
    students = ExactStudents(latents[0], pipeline.process)
    parts = (pipeline.autoencoder, pipeline.conditioner, Boundaries.parse(ends))
    exact = InvertibleConsistency(students, *parts)
    result = exact.generate(["any"], exact.invert(one, ["any"]))
    torch.testing.assert_close(result, pipeline.autoencoder.decode(latents), rtol=0, atol=1e-4)


def test_running_leaves_nothing_behind(pipeline, images):
    result = pipeline.edit(images.clone().requires_grad_(), SOURCES, TARGETS, guidance=GUIDED)
    assert not result.requires_grad
    assert pipeline.students.active == "teacher"
    assert result.min() >= -1
    assert result.max() <= 1


def test_sizes_follow_from_the_family(pipeline):
    assert pipeline.latent_shape(2, 64, 128) == (2, 16, 8, 16)
    assert pipeline.process.prediction_type == "v_prediction"


def test_pictures_may_be_larger_than_those_of_the_training(pipeline):
    wide = torch.zeros(1, 3, 64, 96)
    assert pipeline.edit(wide, ["a"], ["b"], guidance=GUIDED).shape == wide.shape


def test_as_many_prompts_as_pictures(pipeline, images):
    with pytest.raises(ValueError, match="conditioning holds 1 samples, x holds 4"):
        pipeline.invert(images, ["one"])


def test_half_precision(random_family, images):
    family = Family(str(random_family), precision="bfloat16")
    half = InvertibleConsistency.from_pretrained(family)
    result = half.edit(images[:1], SOURCES[:1], TARGETS[:1], guidance=GUIDED)
    assert result.dtype == torch.float32
    assert result.isfinite().all()


# Loading


def test_boundaries_come_from_the_students_unless_they_are_given(random_family, pipeline):
    family = Family(str(random_family))
    assert pipeline.boundaries.boundary_timesteps == tuple(BOUNDARIES)
    released = "249_499_699_999"  # 249 is off the solver's grid
    given = InvertibleConsistency.from_pretrained(family, boundaries=released)
    assert given.boundaries.jumps["reverse"] == ((999, 699), (699, 499), (499, 249), (249, 0))
    with pytest.raises(ValueError, match="not whole numbers"):
        InvertibleConsistency.from_pretrained(family, boundaries="a,b")


def test_students_of_different_boundaries_do_not_belong_together(random_family, tmp_path):
    family = Family(str(random_family))
    write_students(tmp_path, family, boundaries=[0, 499, 999])
    paths = {name: str(tmp_path / name) for name in ("forward", "reverse")}
    both = InvertibleConsistency.from_pretrained(family, **paths)
    assert both.boundaries.num_segments == 2
    with pytest.raises(ValueError, match=r"different boundaries.*\[0, 499, 999\].*do not belong together"):
        InvertibleConsistency.from_pretrained(family, reverse=paths["reverse"])


def test_one_student_that_says_its_boundaries_is_enough(random_family, tmp_path):
    family = Family(str(random_family))
    write_students(tmp_path, family, boundaries=None)
    silent = {name: str(tmp_path / name) for name in ("forward", "reverse")}
    one = InvertibleConsistency.from_pretrained(family, reverse=silent["reverse"])
    assert one.boundaries.boundary_timesteps == tuple(BOUNDARIES)
    with pytest.raises(ValueError, match="does not say its boundaries; name them"):
        InvertibleConsistency.from_pretrained(family, **silent)


def test_students_that_are_missing_or_mixed_up(random_family, tmp_path):
    family, students = Family(str(random_family)), random_family / "students"
    with pytest.raises(FileNotFoundError, match="no student at"):
        InvertibleConsistency.from_pretrained(family, forward=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds the reverse model, and is given as the forward model"):
        InvertibleConsistency.from_pretrained(family, forward=str(students / "reverse"))


def test_bad_boundaries_are_refused_before_anything_is_loaded(random_family, monkeypatch):
    monkeypatch.setattr(Family, "load_model", lambda self, **_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="not whole numbers"):
        InvertibleConsistency.from_pretrained(Family(str(random_family)), boundaries="a,b")
