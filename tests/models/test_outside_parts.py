"""Parts of another package that are mistaken end in one line that says what to write."""

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import pytest
import torch

from icd_lightning.diffusion import Loss, LossValues
from icd_lightning.diffusion.calls import together
from icd_lightning.editing.baselines.base import Baseline, Inversion
from icd_lightning.evaluation.benchmark import Benchmark
from icd_lightning.evaluation.benchmarks.inversion import TO_NOISE_AND_BACK
from icd_lightning.metrics.base import PerImage
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.models.family import Family
from icd_lightning.registry import Entry


class Unsaid(PerImage):
    pass


class Whole(PerImage):
    def values(self, images, reference):
        return images.mean()


class Swapped(PerImage):
    def values(self, images, prompts):
        return images.mean((1, 2, 3))


class Upward(Whole):
    higher_is_better = "up"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unsaid", "Unsaid lacks values"),
        ("Swapped", r"take \(images, prompts\), and its needs are \(images, reference\)"),
        ("Upward", "higher_is_better 'up' is none of True, False and None"),
    ],
)
def test_a_metric_that_is_not_whole_is_refused_before_it_measures(name, message):
    with pytest.raises(ValueError, match=message):
        build_metrics([f"test_outside_parts.{name}"])


def test_a_metric_gives_one_value_a_picture():
    pictures = torch.zeros(2, 3, 8, 8)
    for measure in (Whole().per_image, Whole().update):
        with pytest.raises(ValueError, match=r"Whole.values gives shape \(\): return one value a picture, \(2,\)"):
            measure(pictures, pictures)


class Planned(Loss):
    def plan(self, inputs, draws):
        yield None


def yields(what):
    yield what


@pytest.mark.parametrize(("plan", "what"), [(LossValues(0, 0), "nothing"), (yields(torch.zeros(1)), "a Tensor")])
def test_a_plan_yields_calls(plan, what):
    with pytest.raises(ValueError, match=f"loss near: its plan yields {what}"):
        together({"near": plan})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2), "returns Tensor: return LossValues"),
        (LossValues(torch.zeros(()), torch.zeros(2)), r"returns \(\) and \(2,\)"),
        (LossValues(torch.zeros(2), torch.zeros(2)), "gives the forward model no gradient"),
    ],
)
def test_a_loss_is_of_each_sample_and_trains(values, message):
    with pytest.raises(ValueError, match=message):
        Planned("forward").check("near", values, count=2)
    with torch.no_grad():  # a validation
        Planned("forward").check("near", LossValues(torch.zeros(2), torch.zeros(2)), count=2)


class Still(Baseline):
    def __init__(self, parts, guidance_scale: float = 1.0) -> None:
        super().__init__(parts, guidance_scale)
        self.steps = [(500, 0)]

    def invert_latents(self, x0, prompts, *, seed=0, on_step=None):
        return Inversion(prompts, x0, x0)


class Narrow(Still):
    def move(self, x, split, index, inversion):
        return x[:, :1]


class Latents(Still):
    def invert_latents(self, x0, prompts, *, seed=0, on_step=None):
        return x0


class Seedless(Still):
    def invert_latents(self, x0, prompts):
        return Inversion(prompts, x0, x0)


class Stepless(Still):
    def __init__(self, parts) -> None:
        Baseline.__init__(self, parts, 1.0)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Still, "Still has neither move nor mover: write move"),
        (Narrow, r"Narrow.move gives \(1, 1, 8, 8\): return x after the step, \(1, 16, 8, 8\)"),
        (Latents, r"Latents.invert_latents gives a Tensor: return Inversion\(prompts, x0, noise\)"),
        (Seedless, "Seedless.invert_latents must take .*seed"),
        (Stepless, "Stepless has no steps: call super"),
    ],
)
def test_a_baseline_that_lacks_something_says_what(random_family, cls, message):
    with pytest.raises(ValueError, match=message):
        cls.from_family(Family(str(random_family))).edit(torch.zeros(1, 3, 64, 64), ["a star"], ["a ring"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": TO_NOISE_AND_BACK}, "tasks are .*: give a tuple of Task"),
        ({"tasks": ()}, r"tasks are \(\)"),
        ({"methods": "icd"}, "methods are 'icd': give a tuple of str"),
        ({"tasks": (TO_NOISE_AND_BACK,) * 2}, "two of a benchmark's tasks are named 'inversion'"),
    ],
)
def test_a_benchmark_is_of_tasks_with_names_of_their_own(given, message):
    with pytest.raises(ValueError, match=message):
        Benchmark(**{"tasks": (TO_NOISE_AND_BACK,), "sections": list, **given})


def test_a_class_that_python_does_not_find_is_told_with_its_remedy():
    with pytest.raises(ValueError, match=r"No module named 'nowhere'\): install what holds it, or .*PYTHONPATH"):
        Entry("nowhere.Metric").load()
