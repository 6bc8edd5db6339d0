import pytest
import torch

from icd_lightning.diffusion import (
    CADSGuidance,
    GuidanceSchedule,
    IntervalGuidance,
    StepGuidance,
    classifier_free_guidance,
    guidance_balance,
    guidance_embedding,
)

EVERY_T = torch.arange(1000)


def test_balance_makes_errors_count_alike_that_grow_with_the_square_of_guidance():
    w = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0])
    assert torch.equal(guidance_balance(w, 0.0), torch.ones(5))
    balanced = (w - 1) ** 2 * guidance_balance(w, 1e6)
    torch.testing.assert_close(balanced[w != 1], torch.full((4,), 1e-6))
    assert guidance_balance(w, 4.0)[1] == 1


def test_classifier_free_guidance_at_zero_one_and_beyond(generator: torch.Generator):
    uncond, cond = torch.randn(2, 3, 4, 8, 8, generator=generator)
    assert torch.equal(classifier_free_guidance(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(classifier_free_guidance(uncond, cond, 1.0), cond)
    torch.testing.assert_close(classifier_free_guidance(uncond, cond, 8.0) - cond, 7 * (cond - uncond))


def test_classifier_free_guidance_for_each_sample(generator: torch.Generator):
    uncond, cond = torch.randn(2, 3, 4, 8, 8, generator=generator)
    scales = [1.0, 3.0, 8.0]
    guided = classifier_free_guidance(uncond, cond, torch.tensor(scales))
    for i, scale in enumerate(scales):
        assert torch.equal(guided[i], classifier_free_guidance(uncond[i], cond[i], scale))


def test_embedding_of_unguided_is_all_zeros_and_ones():
    embedding = guidance_embedding(torch.ones(2), 512)
    assert torch.equal(embedding[:, :256], torch.zeros(2, 256))
    assert torch.equal(embedding[:, 256:], torch.ones(2, 256))


def test_embedding_is_float32_and_tells_scales_apart():
    embedding = guidance_embedding(torch.tensor([1.0, 8.0, 8.0, 20.0], dtype=torch.float64), 64)
    assert embedding.shape == (4, 64)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding[1], embedding[2])
    assert (embedding[1] - embedding[3]).norm() > 1


@pytest.mark.parametrize("dim", [511, 2, 0])
def test_a_width_that_holds_no_sines_and_cosines_is_refused(dim: int):
    with pytest.raises(ValueError, match=f"width {dim} .*choose an even dim"):
        guidance_embedding(torch.ones(1), dim)


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        (StepGuidance(8.0, tau=0.7), 0, 700),
        (StepGuidance(8.0, tau=0.57), 0, 570),  # 0.57 * 1000 is 569.99... in float64
        (StepGuidance(8.0), 0, 999),
        (StepGuidance(8.0, tau=0.0), 0, 0),
        (CADSGuidance(8.0, tau1=0.7, tau2=0.7), 0, 700),
        (IntervalGuidance(8.0, lo=0.2, hi=0.6), 200, 600),
        (IntervalGuidance(8.0, lo=0.0, hi=1.0), 0, 999),
    ],
)
def test_guided_from_first_to_last_and_unguided_elsewhere(schedule: GuidanceSchedule, first: int, last: int):
    w = schedule(EVERY_T)
    assert w.dtype == torch.float32
    guided = (first <= EVERY_T) & (last >= EVERY_T)
    assert torch.equal(w, torch.where(guided, 8.0, 1.0))


def test_cads_fades_linearly():
    w = CADSGuidance(9.0, tau1=0.6, tau2=0.8)(torch.tensor([0, 600, 650, 700, 800, 999]))
    torch.testing.assert_close(w, torch.tensor([9.0, 9.0, 7.0, 5.0, 1.0, 1.0]))


def test_cads_approaches_the_step():
    near = CADSGuidance(8.0, tau1=0.7 - 1e-6, tau2=0.7 + 1e-6)(EVERY_T[EVERY_T != 700])
    assert torch.equal(near, StepGuidance(8.0, tau=0.7)(EVERY_T[EVERY_T != 700]))


def test_scale_one_is_unguided_in_every_schedule():
    for schedule in (
        StepGuidance(1.0, 0.5),
        CADSGuidance(1.0, 0.4, 0.8),
        IntervalGuidance(1.0, 0.2, 0.6),
    ):
        torch.testing.assert_close(schedule(EVERY_T), torch.ones(1000))


def test_limits_are_fractions_of_the_models_timesteps():
    w = StepGuidance(8.0, tau=0.5, num_train_timesteps=100)(torch.tensor([49, 50, 51]))
    assert w.tolist() == [8, 8, 1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StepGuidance(8.0, tau=1.5), "tau=1.5"),
        (lambda: StepGuidance(8.0, tau=700), "tau=700: choose fractions"),
        (lambda: CADSGuidance(8.0, tau1=0.8, tau2=0.6), "tau1=0.8, tau2=0.6"),
        (lambda: IntervalGuidance(8.0, lo=-0.1, hi=0.6), "lo=-0.1"),
        (lambda: StepGuidance(8.0, tau=float("nan")), "tau=nan"),
        (lambda: StepGuidance(float("nan")), "guidance_scale nan must be 0"),
        (lambda: StepGuidance(float("inf")), "guidance_scale inf must be 0"),
    ],
)
def test_limits_out_of_order_are_refused(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()
