"""What every baseline promises, on a family of random weights."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from often_case import often
from safetensors.torch import load_file, save_file

from icd_lightning.diffusion import CADSGuidance, IntervalGuidance, Step, StepGuidance
from icd_lightning.editing.baselines.ddim import DDIMInversion, DDIMPromptToPrompt
from icd_lightning.editing.baselines.edit_friendly import EditFriendlyInversion
from icd_lightning.editing.baselines.fireflow import FireFlow
from icd_lightning.editing.baselines.flowedit import FlowEdit
from icd_lightning.editing.baselines.infedit import InfEdit
from icd_lightning.editing.baselines.negative_prompt import NegativePromptInversion
from icd_lightning.editing.baselines.null_text import NullTextInversion, NullTextOptimization
from icd_lightning.editing.baselines.parts import Branch, Parts, predict_branches
from icd_lightning.editing.baselines.pnp_inversion import PnPInversion
from icd_lightning.editing.baselines.renoise import ReNoise, Renoising, Sampler
from icd_lightning.editing.baselines.rf_inversion import RFInversion
from icd_lightning.editing.baselines.rf_solver_edit import RFSolverEdit
from icd_lightning.editing.baselines.sdedit import SDEdit
from icd_lightning.editing.baselines.uniedit_flow import UniEditFlow
from icd_lightning.editing.limits import Injection
from icd_lightning.editing.methods import LOADED, METHODS, OTHERS, build, class_of
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.models.family import Family
from icd_lightning.registry import typed

CONF = Path(__file__).parents[2] / "conf/method"
SOURCES, TARGETS = ["a large red circle", "a small blue square"], ["a large blue circle", "a small star"]
UNGUIDED = StepGuidance(1.0)
FEW = {"num_inference_steps": 4, "guidance_scale": 3.0}
DDIM_RENOISE = {"sampler": Sampler("ddim", 4), "renoising": Renoising(1), "regularization": None, "correction": 0.0}
STUDENTS = ("forward", "reverse")
SMALL = {
    "ddim_p2p": (DDIMPromptToPrompt, FEW),
    "npi": (NegativePromptInversion, FEW),
    "nti": (NullTextInversion, FEW | {"optimization": NullTextOptimization(inner_steps=2, tolerance=0.0)}),
    "pnp_inversion": (PnPInversion, FEW),
    "edit_friendly": (EditFriendlyInversion, FEW | {"skip": 1}),
    "infedit": (InfEdit, FEW),
    "infedit by two evaluations": (InfEdit, FEW),
    "renoise": (ReNoise, DDIM_RENOISE),
    "sdedit": (SDEdit, FEW),
    "flowedit": (FlowEdit, FEW | {"skip": 1}),
    "rf_solver_edit": (RFSolverEdit, FEW | {"num_inference_steps": 2, "control": Injection(inject=0.5, blend=False)}),
    "fireflow": (FireFlow, FEW | {"control": Injection(inject=0.5, text=True)}),
    "rf_inversion": (RFInversion, FEW),
    "uniedit_flow": (UniEditFlow, FEW),
}
FLOWS = list(SMALL)[-5:]
KINDS = ("npi", "edit_friendly", "infedit", "flowedit")  # of inversion; the others come with the slow tests


@pytest.fixture(scope="module")
def family(random_family) -> Family:
    return Family(str(random_family))


@pytest.fixture(scope="module")
def parts(family) -> dict[bool, Parts]:
    return {few_step: Parts.load(family, few_step=few_step) for few_step in (False, True)}


@pytest.fixture(scope="module")
def flow_parts(flow_layouts) -> Parts:
    return Parts.load(Family(str(flow_layouts["flux"])))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(params=often(SMALL, *KINDS))
def method(request, parts, flow_parts):
    cls, settings = SMALL[request.param]
    return cls(flow_parts if request.param in FLOWS else parts[request.param == "infedit"], **settings)


@pytest.mark.parametrize("method", SMALL, indirect=True)
def test_evaluations_are_counted(method, images):
    steps, rows = list[Step](), []
    hook = method.parts.model.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    method.edit(images, SOURCES, TARGETS, on_step=steps.append)
    assert sum(step.nfe for step in steps) == sum(rows) / len(images)
    cost = sum(rows)
    rows.clear()
    steps.clear()
    method.edit(images, SOURCES, TARGETS, guidance=UNGUIDED, control=None, on_step=steps.append)
    hook.remove()
    assert sum(step.nfe for step in steps) == sum(rows) / len(images)
    assert sum(rows) <= cost


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
    processors, state = dict(method.parts.model.network.attn_processors), torch.get_rng_state()
    result = method.edit(images.clone().requires_grad_(), SOURCES, TARGETS)
    assert method.parts.model.network.attn_processors == processors
    assert torch.equal(torch.get_rng_state(), state)
    assert not result.requires_grad
    assert all(parameter.grad is None for parameter in method.parts.model.network.parameters())


@pytest.mark.parametrize(
    "name", often(["ddim_p2p", "npi", "nti", "pnp_inversion", "edit_friendly", "infedit"], "npi", "infedit")
)
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


def test_an_edit_fits_to_the_guidance_that_it_is_given(parts, family, images):
    settings = FEW | {"optimization": NullTextOptimization(inner_steps=15, tolerance=0.0, tolerance_growth=0.0)}
    given = StepGuidance(6.0)
    here, there = (NullTextInversion(parts[False], **settings | {"guidance_scale": w}) for w in (3.0, 6.0))
    told = (images, SOURCES, SOURCES)
    fitted = here.edit(*told, guidance=given)
    assert torch.equal(fitted, there.edit(*told))
    assert here.guidance == StepGuidance(3.0)
    retraced = NegativePromptInversion(parts[False], **FEW).edit(*told)
    plain = DDIMInversion(family, num_inference_steps=4).edit(*told, guidance=given)
    assert (fitted - retraced).square().mean() < 0.7 * (plain - retraced).square().mean()


def test_pnp_inversion_finds_its_differences_under_the_guidance_given(parts, images):
    here, there = (PnPInversion(parts[False], **FEW | {"guidance_scale": w}) for w in (3.0, 1.0))
    steps = list[Step]()
    edited = here.edit(images, SOURCES, TARGETS, guidance=UNGUIDED, on_step=steps.append)
    assert torch.equal(edited, there.edit(images, SOURCES, TARGETS))
    assert sum(step.nfe for step in steps) == 4 * 4


def test_words_say_where_an_edit_blends(parts, images):
    control = PromptToPrompt(blend_threshold=0.98)  # random attention is nearly even
    method = NegativePromptInversion(parts[False], **FEW, control=control)
    usual = method.edit(images, SOURCES, TARGETS)
    assert torch.equal(method.edit(images, SOURCES, TARGETS, blended_words=[None, None]), usual)
    told = method.edit(images, SOURCES, TARGETS, blended_words=[("large", "circle"), None])
    each = [replace(control, blend=("large", "circle")), control]
    assert torch.equal(told, method.edit(images, SOURCES, TARGETS, control=each))
    assert torch.equal(told[1], usual[1])
    assert not torch.allclose(told[0], usual[0], atol=1e-3)
    words = {"blended_words": [("large", "circle"), None]}
    for free in (EditFriendlyInversion(parts[False], **FEW, skip=1), SDEdit(parts[False], **FEW)):  # they blend nothing
        plain = free.edit(images, SOURCES, TARGETS)
        assert torch.equal(free.edit(images, SOURCES, TARGETS, **words), plain)


def test_options_of_an_edit_are_those_of_its_control(parts, images):
    method = NegativePromptInversion(parts[False], **FEW)
    changed = method.edit(images, SOURCES, TARGETS, cross_replace=0.9, self_replace=0.0)
    control = replace(method.control, cross_replace=0.9, self_replace=0.0)
    assert torch.equal(changed, method.edit(images, SOURCES, TARGETS, control=control))
    sdedit = SDEdit(parts[False], **FEW)
    borrowing = sdedit.edit(images, SOURCES, TARGETS, amplify=2.0)
    assert torch.equal(borrowing, sdedit.edit(images, SOURCES, TARGETS, control=PromptToPrompt(amplify=2.0)))
    with pytest.raises(ValueError, match=r"edits have no swap_tau; what they borrow: cross_replace, self_replace"):
        method.edit(images, SOURCES, TARGETS, swap_tau=0.5)


@pytest.mark.parametrize(
    "name", often(["npi", "nti", "pnp_inversion", "infedit", "renoise", "sdedit", "ddim"], "npi", "sdedit", "ddim")
)
def test_sdxl_is_told_the_size_of_the_pictures(layouts, name):
    family = Family(str(layouts["sdxl"]))
    if name == "ddim":
        method = DDIMInversion(family, num_inference_steps=2)
        unet = method.model.network
    else:
        cls, settings = SMALL[name]
        method = cls(Parts.load(family, few_step=name == "infedit"), **settings)
        unet = method.parts.model.network
    told = []
    hook = unet.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    method.edit(torch.zeros(1, 3, 64, 128), ["a red cat"], ["a red dog"])
    hook.remove()
    assert torch.cat(told).unique(dim=0).tolist() == [[64, 128, 0, 0, 64, 128]]


def test_ddim_swaps_no_prompt_under_constant_guidance(family, images):
    method, dynamic = (DDIMInversion(family, num_inference_steps=5, guidance_scale=3.0, tau=t) for t in (1.0, 0.7))
    steps = list[Step]()
    edited = method.edit(images, SOURCES, TARGETS, on_step=steps.append)
    assert sum(step.nfe for step in steps) == 15
    noise = method.invert(images, SOURCES)
    assert torch.equal(edited, method.generate(TARGETS, noise, guidance=method.guidance))
    usual = dynamic.edit(images, SOURCES, TARGETS, guidance=dynamic.guidance)
    assert torch.equal(usual, dynamic.edit(images, SOURCES, TARGETS, guidance=dynamic.guidance, swap_tau=0.7))


@pytest.mark.parametrize("guidance", [StepGuidance(3.0, 0.7), CADSGuidance(3, 0.3, 0.7), IntervalGuidance(3, 0.2, 0.7)])
def test_prompts_are_swapped_where_guidance_ends(family, guidance):
    method = DDIMInversion(family, num_inference_steps=5)
    assert method.swapping(SOURCES, TARGETS, guidance=guidance, swap_tau=None).tau == 0.7


def test_a_swap_of_prompts_leaves_the_pooled_one_the_targets(layouts):
    """As the paper's script for SDXL decodes."""
    method, told = DDIMInversion(Family(str(layouts["sdxl"])), num_inference_steps=2), []
    source, target = (method.conditioner([prompt]).tensors for prompt in ("a red cat", "a blue dog"))
    noise = torch.zeros(1, 4, 32, 32)
    hook = method.network.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs), with_kwargs=True)
    method.edit(None, ["a red cat"], ["a blue dog"], guidance=StepGuidance(1.0), swap_tau=0.4, noise=noise)
    hook.remove()
    assert [torch.equal(one["encoder_hidden_states"], source["prompt_embeds"]) for one in told] == [True, False]
    for one in told:
        assert torch.equal(one["added_cond_kwargs"]["text_embeds"], target["pooled_prompt_embeds"])


def test_ddim_counts_what_guidance_takes(family, images):
    method = DDIMInversion(family, num_inference_steps=5, guidance_scale=3.0, tau=0.7)
    for guidance in (None, UNGUIDED, StepGuidance(3.0)):
        for swap_tau in (0.5, 0.8, 1.0):
            rows, steps = [], list[Step]()
            hook = method.network.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
            method.edit(images, SOURCES, TARGETS, guidance=guidance, swap_tau=swap_tau, on_step=steps.append)
            hook.remove()
            assert sum(step.nfe for step in steps) == sum(rows) / len(images)


def test_branches_joined_are_branches_apart(parts):
    """Whatever w each has, and whether the network takes it."""
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for few_step, costs in ((False, 3), (True, 2)):
        part = parts[few_step]
        told = [part.conditioner(prompts) for prompts in (SOURCES, TARGETS)]
        empty = part.conditioner.unconditional(2)
        branches = [Branch(told[0], empty), Branch(told[1], empty, StepGuidance(3.0))]
        with torch.no_grad():
            joined, nfe = predict_branches(part, x, 500, branches)
            apart = [
                predict_branches(part, half, 500, [branch]) for half, branch in zip(x.chunk(2), branches, strict=True)
            ]
        torch.testing.assert_close(joined.eps, torch.cat([split.eps for split, _ in apart]), rtol=1e-4, atol=1e-4)
        assert nfe == sum(cost for _, cost in apart) == costs


@pytest.mark.parametrize("architecture", often(["sd15", "sdxl"], "sdxl"))
def test_other_families(architecture, layouts):
    """Their networks at minimal widths; SDXL's is told sizes too, and its empty prompt is zeros."""
    family = Family(str(layouts[architecture]))
    few_step, teacher = (Parts.load(family, few_step=few) for few in (True, False))
    image, told = torch.rand(1, 3, 64, 64) * 2 - 1, (["a red cat"], ["a red dog"])
    for name, few in (("npi", False), ("nti", False), ("edit_friendly", False), ("infedit", True), ("renoise", False)):
        cls, settings = SMALL[name]
        edited = cls(few_step if few else teacher, **settings).edit(image, *told)
        assert edited.isfinite().all()
        assert edited.shape == image.shape


def test_null_text_inversion_needs_classifier_free_guidance(parts):
    with pytest.raises(
        ValueError, match=r"NullTextInversion changes what .* needs a network without guidance embedding"
    ):
        NullTextInversion(parts[True])


# By name


@pytest.mark.parametrize("name", OTHERS)
def test_the_configuration_of_a_method_is_its_default_in_full(name):
    written, entry, cls = METHODS.find(str(CONF / f"{name}.yaml")), METHODS.find(name), class_of(name)
    assert written.class_path == entry.class_path
    assert typed(cls, written.init_args, skip=LOADED) == typed(cls, entry.init_args, skip=LOADED)
    assert set(written.init_args) == set(typed(cls, {}, skip=LOADED))


def test_every_baseline_has_a_configuration():
    assert {file.stem for file in CONF.glob("*.yaml")} == set(OTHERS)


def test_presets_are_those_of_two_scripts():
    """iCD's launch scripts and PIE-Bench's: (w, cross, self, amplify, which words, blend from, alignment)."""
    presets = {
        "nti": (8.0, 0.4, 0.8, 3.0, "absent", 0.0, "auto"),
        "npi": (8.0, 0.2, 0.5, 3.0, "absent", 0.0, "auto"),
        **dict.fromkeys(
            ["ddim_p2p", "nti_pie", "npi_pie", "pnp_inversion"], (7.5, 0.4, 0.6, 2.0, "blended", 0.2, "refine")
        ),
    }
    names = ("cross_replace", "self_replace", "amplify", "amplified", "blend_from", "alignment")
    for name, expected in presets.items():
        settings = typed(class_of(name), METHODS.find(name).init_args, skip=LOADED)
        control = settings["control"]
        assert (settings["guidance_scale"], *(getattr(control, field) for field in names)) == expected
        assert (control.blend, control.blend_threshold) == (True, 0.3)


def test_methods_are_built_by_name_or_file(family, tmp_path):
    method = build("npi", family, num_inference_steps=3)
    assert isinstance(method, NegativePromptInversion)
    assert (len(method.steps), method.guidance.guidance_scale) == (3, 8.0)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "class_path: icd_lightning.editing.baselines.sdedit.SDEdit\ninit_args: {strength: 0.1, num_inference_steps: 10}"
    )
    assert len(build(str(file), family).steps) == 1
    with pytest.raises(
        ValueError, match=r"no method 'magic'; there is: icd, .*uniedit_flow; or a class's path, or a YAML file"
    ):
        build("magic", family)
    with pytest.raises(ValueError, match="strenght"):
        build("sdedit", family, strenght=0.5)


@pytest.mark.parametrize("name", often(["renoise_turbo", "renoise_lcm"], "renoise_lcm"))
def test_families_of_students_have_those_inverted(family, images, name):
    method, steps, rows = build(name, family), list[Step](), []
    assert method.sampler.kind == "jumps"
    assert method.steps == [(999, 779), (779, 519), (519, 259), (259, 0)]
    hook = method.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    method.edit(images, SOURCES, TARGETS, on_step=steps.append)
    hook.remove()
    assert sum(step.nfe for step in steps) == sum(rows) / len(images)


def test_the_students_that_are_named_are_inverted(family, images, tmp_path):
    paths = {name: str(shutil.copytree(family.root / "students" / name, tmp_path / name)) for name in STUDENTS}
    for file in (tmp_path / "reverse").glob("*.safetensors"):
        save_file({name: 3 * tensor for name, tensor in load_file(file).items()}, file)
    usual, named = build("renoise_lcm", family), build("renoise_lcm", family, students=paths)
    assert usual.steps == named.steps
    edits = [method.edit(images, SOURCES, TARGETS) for method in (usual, named)]
    assert not torch.allclose(*edits, atol=1e-3)
    jumps = build("renoise_lcm", family, students={"boundaries": "499,999"})
    assert jumps.steps == [(999, 499), (499, 0)]


def test_methods_say_whether_they_use_students(family):
    told = {"forward": None, "reverse": None, "boundaries": None}
    uses = {"renoise_turbo": True, "renoise_sdxl": False, "npi": False, "ddim": False, "icd": True, "untrained": False}
    assert {name: build(name, family, students=told).uses_students for name in uses} == uses


@pytest.mark.parametrize("name", ["infedit", "renoise_turbo", "renoise_lcm", "renoise_sdxl"])
def test_a_teacher_taken_for_a_few_step_model_is_named(layouts, tmp_path, caplog, name):
    settings = {} if name == "infedit" else {"regularization": None}
    model = str(shutil.copytree(layouts["sd15"], tmp_path / "plain", ignore=shutil.ignore_patterns("unet_guided")))
    with caplog.at_level(logging.WARNING):
        build(name, Family(model), **settings)
    found = [record.getMessage() for record in caplog.records if "taken for an LCM or Turbo" in record.getMessage()]
    assert len(found) == (name != "renoise_sdxl")
    assert all(message.startswith(f"{model} has no guidance-distilled network") for message in found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("class_path: [", "mine.yaml must hold class_path and init_args.*expected the node content"),
        ("just words", "mine.yaml must hold class_path and init_args"),
        ("init_args: {strength: 0.1}", "mine.yaml must hold class_path and init_args.*class_path"),
        ("class_path: a.B\nsettings: {}", "mine.yaml must hold class_path and init_args.*settings"),
        ("class_path: a.B\ninit_args: 3", "mine.yaml must hold class_path and init_args.*init_args 3 are no mapping"),
        ("class_path: SDEdit", "mine.yaml must hold class_path and init_args.*'SDEdit' is no module.Class"),
        ("class_path: nowhere.SDEdit", "mine.yaml: there is no class nowhere.SDEdit"),
        ("class_path: icd_lightning.editing.baselines.sdedit.No", "mine.yaml: there is no class .*No"),
        (
            "class_path: icd_lightning.editing.baselines.sdedit.SDEdit\ninit_args: {strenght: 0.1}",
            "mine.yaml: SDEdit: .*strenght",
        ),
    ],
)
def test_a_method_file_that_is_wrong_is_named(family, tmp_path, text, reason):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        build(str(file), family)


def test_a_method_file_that_is_missing_is_named(family):
    with pytest.raises(ValueError, match=r"nowhere.yaml must hold class_path.*there is no nowhere.yaml"):
        build("nowhere.yaml", family)
