"""What every baseline promises, on a family of random weights."""

from pathlib import Path

import pytest
import torch
import yaml

from icd_lightning.diffusion import Step, StepGuidance
from icd_lightning.editing.baselines.branches import Branch, predict_branches
from icd_lightning.editing.baselines.ddim import DDIMInversion
from icd_lightning.editing.baselines.edit_friendly import EditFriendlyInversion
from icd_lightning.editing.baselines.infedit import InfEdit
from icd_lightning.editing.baselines.negative_prompt import NegativePromptInversion
from icd_lightning.editing.baselines.null_text import NullTextInversion, NullTextOptimization
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.baselines.pnp_inversion import PnPInversion
from icd_lightning.editing.baselines.registry import METHODS, build, find, typed
from icd_lightning.editing.baselines.renoise import ReNoise, Renoising, Sampler
from icd_lightning.editing.baselines.sdedit import SDEdit
from icd_lightning.models.family import Family

CONF = Path(__file__).parents[2] / "conf/method"
SOURCES, TARGETS = ["a large red circle", "a small blue square"], ["a large blue circle", "a small star"]
UNGUIDED = StepGuidance(1.0)
FEW = {"num_inference_steps": 4, "guidance_scale": 3.0}
DDIM_RENOISE = {"sampler": Sampler("ddim", 4), "renoising": Renoising(1), "regularization": None, "correction": 0.0}
SMALL = {
    "npi": (NegativePromptInversion, FEW),
    "nti": (NullTextInversion, FEW | {"optimization": NullTextOptimization(inner_steps=2, tolerance=0.0)}),
    "pnp_inversion": (PnPInversion, FEW),
    "edit_friendly": (EditFriendlyInversion, FEW | {"skip": 1}),
    "infedit": (InfEdit, FEW),
    "infedit by two evaluations": (InfEdit, FEW),
    "renoise": (ReNoise, DDIM_RENOISE),
    "sdedit": (SDEdit, FEW),
}


@pytest.fixture(scope="module")
def family(random_family) -> Family:
    return Family(str(random_family))


@pytest.fixture(scope="module")
def parts(family) -> dict[bool, Parts]:
    return {few_step: Parts.load(family, few_step=few_step) for few_step in (False, True)}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=SMALL)
def method(request, parts):
    cls, settings = SMALL[request.param]
    return cls(parts[request.param == "infedit"], **settings)


def test_evaluations_are_counted_and_declared(method, images):
    steps, rows = list[Step](), []
    hook = method.parts.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    method.edit(images, SOURCES, TARGETS, on_step=steps.append)
    assert sum(step.nfe for step in steps) == sum(rows) / len(images) == method.nfe()
    rows.clear()
    method.edit(images, SOURCES, TARGETS, guidance=UNGUIDED, control=None)
    hook.remove()
    assert sum(rows) / len(images) == method.nfe(guidance=UNGUIDED, control=None) <= method.nfe()


def test_a_picture_alone_is_as_in_its_batch(method, images):
    edited = method.edit(images, SOURCES, TARGETS, seed=5)
    assert edited.shape == images.shape
    for i in range(2):
        alone = method.edit(images[i : i + 1], SOURCES[i : i + 1], TARGETS[i : i + 1], seed=5 + i)
        torch.testing.assert_close(alone, edited[i : i + 1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(method.edit(images, SOURCES, TARGETS, seed=[5, 6]), edited, rtol=0, atol=0)


def test_an_edit_to_the_same_prompts_is_a_reconstruction(method, images):
    inversion = method.invert(images, SOURCES)
    again = method.generate(SOURCES, inversion)
    assert torch.equal(method.edit(images, SOURCES, SOURCES, control=None), again)
    assert not torch.allclose(method.edit(images, SOURCES, TARGETS), again, atol=1e-3)


def test_nothing_is_left_behind(method, images):
    processors, state = dict(method.parts.unet.attn_processors), torch.get_rng_state()
    result = method.edit(images.clone().requires_grad_(), SOURCES, TARGETS)
    assert method.parts.unet.attn_processors == processors
    assert torch.equal(torch.get_rng_state(), state)
    assert not result.requires_grad
    assert all(parameter.grad is None for parameter in method.parts.unet.parameters())


@pytest.mark.parametrize("name", ["npi", "nti", "pnp_inversion", "edit_friendly", "infedit"])
def test_attention_is_borrowed_by_default(parts, images, name):
    cls, settings = SMALL[name]
    method = cls(parts[name == "infedit"], **settings)
    assert method.control is not None
    edited = method.edit(images, SOURCES, TARGETS)
    inversion = method.invert(images, SOURCES)
    assert torch.equal(method.generate(TARGETS, inversion, control=method.control), edited)
    assert not torch.allclose(method.generate(TARGETS, inversion), edited, atol=1e-3)
    each = [method.control] * 2
    assert torch.equal(method.generate(TARGETS, inversion, control=each), edited)


def test_ddim_counts_what_guidance_takes(family, images):
    method = DDIMInversion(family, num_inference_steps=5, guidance_scale=3.0, tau=0.7)
    for guidance in (None, UNGUIDED, StepGuidance(3.0)):
        for swap_tau in (0.5, 0.8, 1.0):
            steps = list[Step]()
            method.edit(images, SOURCES, TARGETS, guidance=guidance, swap_tau=swap_tau, on_step=steps.append)
            assert sum(step.nfe for step in steps) == method.nfe(guidance=guidance, swap_tau=swap_tau)


def test_branches_joined_are_branches_apart(parts, schedule):
    """Whatever w each has, and whether the network takes it."""
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for few_step, costs in ((False, 3), (True, 2)):
        part = parts[few_step]
        told = [part.conditioner(prompts) for prompts in (SOURCES, TARGETS)]
        empty = part.conditioner.unconditional(2)
        branches = [Branch(told[0], empty), Branch(told[1], empty, StepGuidance(3.0))]
        with torch.no_grad():
            joined, nfe = predict_branches(part.network, x, 500, branches)
            apart = [
                predict_branches(part.network, half, 500, [branch])
                for half, branch in zip(x.chunk(2), branches, strict=True)
            ]
        torch.testing.assert_close(joined, torch.cat([eps for eps, _ in apart]), rtol=1e-4, atol=1e-4)
        assert nfe == sum(cost for _, cost in apart) == costs


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_other_families(architecture, layouts):
    """Their networks at minimal widths; SDXL's is told sizes too, and its empty prompt is zeros."""
    family = Family(str(layouts[architecture]))
    few_step, teacher = (Parts.load(family, few_step=few) for few in (True, False))
    image, told = torch.rand(1, 3, 64, 64) * 2 - 1, (["a red cat"], ["a red dog"])
    for name, few in (("npi", False), ("nti", False), ("edit_friendly", False), ("infedit", True), ("renoise", False)):
        cls, settings = SMALL[name]
        method, steps = cls(few_step if few else teacher, **settings), list[Step]()
        edited = method.edit(image, *told, on_step=steps.append)
        assert edited.isfinite().all()
        assert edited.shape == image.shape
        assert sum(step.nfe for step in steps) == method.nfe()


def test_null_text_inversion_needs_classifier_free_guidance(parts):
    with pytest.raises(ValueError, match="without its embedding"):
        NullTextInversion(parts[True])


# By name


@pytest.mark.parametrize("name", METHODS)
def test_the_configuration_of_a_method_is_its_default_in_full(name):
    from importlib import import_module

    written, entry = find(str(CONF / f"{name}.yaml")), METHODS[name]
    assert written.class_path == entry.class_path
    module, _, cls = entry.class_path.rpartition(".")
    cls = getattr(import_module(module), cls)
    assert typed(cls, written.init_args) == typed(cls, entry.init_args)
    assert set(yaml.safe_load((CONF / f"{name}.yaml").read_text())["init_args"]) == set(typed(cls, {}))


def test_every_method_has_a_configuration():
    assert {file.stem for file in CONF.glob("*.yaml")} == set(METHODS)


def test_methods_are_built_by_name_or_file(family, tmp_path):
    method = build("npi", family, num_inference_steps=3)
    assert isinstance(method, NegativePromptInversion)
    assert (len(method.steps), method.guidance.guidance_scale) == (3, 8.0)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "class_path: icd_lightning.editing.baselines.sdedit.SDEdit\ninit_args: {strength: 0.1, num_inference_steps: 10}"
    )
    assert len(build(str(file), family).steps) == 1
    with pytest.raises(ValueError, match=r"no method 'magic'; there is: ddim, .*, or a YAML file"):
        build("magic", family)
    with pytest.raises(ValueError, match="strenght"):
        build("sdedit", family, strenght=0.5)


@pytest.mark.parametrize("name", ["renoise_turbo", "renoise_lcm"])
def test_families_of_students_have_those_inverted(family, images, name):
    method, steps = build(name, family), list[Step]()
    assert method.sampler.kind == "jumps"
    assert method.steps == [(999, 779), (779, 519), (519, 259), (259, 0)]
    method.edit(images, SOURCES, TARGETS, on_step=steps.append)
    assert sum(step.nfe for step in steps) == method.nfe()
