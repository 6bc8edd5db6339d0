import copy
import logging
import pickle
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing import merging
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.editing.merging import MergedStudent, MergedStudents
from icd_lightning.editing.method import seeded_noise
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.family import Family
from icd_lightning.models.students import DIRECTIONS, LoraStudents

SOURCES, TARGETS = ["a large red circle", "a small blue square"], ["a large green circle", "a blue star"]
GUIDED = StepGuidance(3.0, 0.8)


@pytest.fixture
def method(random_family: Path) -> InvertibleConsistency:
    return InvertibleConsistency.from_pretrained(Family(str(random_family)))


def inputs(method: InvertibleConsistency) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
    x = seeded_noise(method.latent_shape(2, 64, 64), 0)
    return x, torch.tensor([259, 999]), method.conditioner(SOURCES), torch.tensor([1.0, 3.0])


def layers(students: LoraStudents) -> dict[str, int]:
    return {name: id(module) for name, module in students.named_modules()}


@pytest.mark.parametrize("direction", DIRECTIONS)
@torch.no_grad()
def test_a_merged_student_is_the_student_and_leaves_the_network_as_it_was(method, direction):
    students, told = method.students, inputs(method)
    before, weights = layers(students), {name: weight.clone() for name, weight in students.state_dict().items()}
    expected, teacher = students.predict(direction, *told), students.predict("teacher", *told)
    merged = MergedStudent(students, direction)
    for _ in range(2):
        torch.testing.assert_close(merged(*told), expected, rtol=1e-4, atol=1e-5)
    assert (expected - teacher).abs().max() > 1e-2
    assert layers(students) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in students.state_dict().items())
    assert torch.equal(students.predict("teacher", *told), teacher)


@torch.no_grad()
def test_the_network_is_as_it_was_after_an_error(method):
    before, (x, t, conditioning, w) = layers(method.students), inputs(method)
    with pytest.raises(RuntimeError):
        MergedStudent(method.students, "reverse")(x[:, :3], t, conditioning, w)
    assert layers(method.students) == before


def test_gradients_reach_the_student(method):
    MergedStudent(method.students, "reverse")(*inputs(method)).sum().backward()
    gradients = [weight.grad for weight in method.students.parameters_of("reverse")]
    assert all(gradient is not None for gradient in gradients)


@torch.no_grad()
def test_in_half_precision_nothing_is_rounded_away(random_family):
    method = InvertibleConsistency.from_pretrained(Family(str(random_family), precision="bfloat16"))
    told = inputs(method)
    assert torch.equal(MergedStudent(method.students, "reverse")(*told), method.students.predict("reverse", *told))


@pytest.fixture
def memory(monkeypatch, caplog):
    """Set the bytes that are free; what is then said of them can be read in caplog."""
    caplog.set_level(logging.INFO, "icd_lightning")
    return lambda free: monkeypatch.setattr(merging, "free_memory", lambda device: free)


def test_both_students_are_kept_where_their_weights_are_a_quarter_of_what_is_free(method, memory, caplog):
    needed, told = MergedStudent(method.students, "forward").nbytes, inputs(method)
    for count, kept in ((8, True), (7, False)):
        memory(count * needed)
        merged = MergedStudents(method.students)
        with torch.no_grad():
            for direction in DIRECTIONS:
                merged[direction](*told)
        found = {direction: weakref.ref(merged[direction]) for direction in DIRECTIONS}
        assert [found[direction]() is not None for direction in DIRECTIONS] == [kept, kept]
        (said,) = caplog.messages
        assert said.startswith("both students are kept merged: " if kept else "students are merged for each loop: ")
        assert said.endswith(f"together {2 * needed >> 20} MiB, of {count * needed >> 20} MiB free on cpu")
        caplog.clear()


def test_denoisers_that_live_at_a_time_share_the_weights_and_later_ones_follow_the_student(method, memory):
    x, t, *_ = inputs(method)
    for free, change in ((0, halve), (1 << 50, halve), (1 << 50, halve_data), (1 << 50, halve_beneath)):
        memory(free)
        method.merged = MergedStudents(method.students)
        first, second = method.denoiser(SOURCES, GUIDED), method.denoiser(TARGETS, GUIDED)
        with torch.no_grad():
            before = first(x, t).eps
        assert first.network is second.network
        del first, second
        change(method.students)
        denoise = method.denoiser(SOURCES, GUIDED)
        with torch.no_grad():
            found = denoise(x, t).eps
            unmerged = replace(denoise, network=partial(method.students.predict, "reverse"))
            torch.testing.assert_close(found, unmerged(x, t).eps, rtol=1e-4, atol=1e-5)
        assert (found - before).abs().max() > 1e-3


@torch.no_grad()
def halve(students: LoraStudents) -> None:
    for weight in students.parameters_of("reverse"):
        weight.mul_(0.5)


def halve_data(students: LoraStudents) -> None:
    """Twice: the second may lie where the first one lay."""
    for weight in students.parameters_of("reverse"):
        for _ in range(2):
            weight.data = weight.data * 0.7


@torch.no_grad()
def halve_beneath(students: LoraStudents) -> None:
    for layer, *_ in students.layers_of("reverse").values():
        layer.base_layer.weight.mul_(0.5)


def test_weights_made_in_inference_mode_are_merged_too(random_family):
    with torch.inference_mode():
        method = InvertibleConsistency.from_pretrained(Family(str(random_family)))
        told = inputs(method)
        expected = method.students.predict("reverse", *told)
        torch.testing.assert_close(method.merged["reverse"](*told), expected, rtol=1e-4, atol=1e-5)
        assert method.merged["reverse"].holds


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_edit_with_their_own_students(random_family, memory, way):
    memory(1 << 50)
    pipe = InvertibleConsistencyPipeline.from_pretrained(random_family)
    before = pipe(SOURCES, seed=0, output_type="latent").images
    other = copy.deepcopy(pipe) if way == "copy" else pickle.loads(pickle.dumps(pipe))
    assert torch.equal(other(SOURCES, seed=0, output_type="latent").images, before)
    halve(other.students)
    assert (other(SOURCES, seed=0, output_type="latent").images - before).abs().max() > 1e-3
    assert torch.equal(pipe(SOURCES, seed=0, output_type="latent").images, before)


def test_a_pipeline_that_moves_leaves_no_merged_weights_behind(random_family, memory):
    memory(1 << 50)
    pipe = InvertibleConsistencyPipeline.from_pretrained(random_family)
    kept = weakref.ref(pipe.method.merged["reverse"])
    assert kept() is not None
    assert pipe.to("cpu") is pipe
    assert kept() is None


def test_what_is_offloaded_between_calls_is_not_kept(method, memory):
    memory(1 << 50)
    method.students.network._hf_hook = object()
    kept = weakref.ref(method.merged["reverse"])
    assert kept() is None


def test_edits_are_the_same_merged_or_not(method):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    edited = []
    for merged in (method.merged, None):
        method.merged = merged
        noise = method.invert(images, SOURCES)
        edited.append(method.decode_pairs(noise, SOURCES, TARGETS, guidance=GUIDED, control=PromptToPrompt()))
    torch.testing.assert_close(*edited, rtol=1e-3, atol=1e-4)
