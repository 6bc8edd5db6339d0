"""Keys and values shared in joint attention, on narrow networks of FLUX.1 and SD3 with random weights."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from icd_lightning.diffusion import Boundaries, Step, StepGuidance
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.baselines.rf_solver_edit import RFSolverEdit
from icd_lightning.editing.consistency import AttentionControlled
from icd_lightning.editing.injection import InjectionControl, JointAttention, joint_layers, usual_control
from icd_lightning.editing.limits import Injection, PromptToPrompt
from icd_lightning.editing.prompt_to_prompt import AttentionControl, PromptToPromptControl
from icd_lightning.models.family import Family
from icd_lightning.models.students import LoraStudents

SOURCES, TARGETS = ["red star", "star"], ["star red star", "red"]
TIMES = [(999, 749), (749, 499), (499, 249)]
DIFFERENT = [{}, {"keys": False}, {"text": False}, {"blocks_from": 0.5}, {"inject": 0.4}]
WHOLE = Injection(inject=1.0, text=True, blend=False)


@pytest.fixture(scope="module", params=["flux", "sd3"])
def parts(request, flow_layouts) -> Parts:
    return Parts.load(Family(str(flow_layouts[request.param])))


def noise() -> Tensor:
    return torch.randn(2, 16, 16, 8, generator=torch.Generator().manual_seed(0))


def control_of(parts: Parts, settings: Injection, targets: list[str] = TARGETS) -> InjectionControl:
    edits = (SOURCES, targets, noise())
    return InjectionControl(settings, *edits, tokenizer=parts.conditioner.tokenizer, num_steps=len(TIMES))


@torch.no_grad()
def decode(parts: Parts, control: AttentionControl | None, targets: list[str] = TARGETS) -> list[Tensor]:
    """What [sources, targets] (4, C, h, w) are after each step, from the same noise."""
    x, told, found = noise().repeat(2, 1, 1, 1), parts.conditioner([*SOURCES, *targets]), []
    with nullcontext() if control is None else control.attached(parts.model.network):
        for t, s in TIMES:
            x = parts.model.process.mix(*parts.split(x, t, told), s)
            x = x if control is None else control.step(x)
            found.append(x)
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_step_is_the_plain_result_and_the_same_prompts_are_the_source(parts):
    plain = decode(parts, None)[-1]
    assert torch.equal(decode(parts, control_of(parts, Injection(inject=0.0, blend=False)))[-1], plain)
    same = decode(parts, control_of(parts, WHOLE, SOURCES), SOURCES)[-1]
    close(same[2:], same[:2])
    close(same[:2], plain[:2])


@pytest.mark.parametrize("settings", DIFFERENT, ids=str)
def test_the_source_never_changes_and_the_target_does(parts, settings):
    plain = decode(parts, None)
    found = decode(parts, control_of(parts, Injection(**{**vars(WHOLE), **settings})))
    for step, (x, usual) in enumerate(zip(found, plain, strict=True)):
        close(x[:2], usual[:2])
        assert not torch.allclose(x[2:], usual[2:], atol=1e-4), step
    others = decode(parts, control_of(parts, WHOLE))[-1]
    assert not settings or not torch.allclose(found[-1][2:], others[2:], atol=1e-5)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("half", [(0.0, 0.5), (0.5, 1.0), (0.0, 1.0)], ids=str)
def test_as_if_the_projections_of_these_blocks_gave_the_sources(parts, keys, half):
    """Norms and positions act on tokens one by one, so that it is the same to exchange what they get."""
    names, network = joint_layers(parts.model.network), parts.model.network
    chosen = names[int(half[0] * len(names)) : round(half[1] * len(names) + 0.4)]
    hooks = []
    for name in chosen:
        for child in ("to_v", "add_v_proj", *(("to_k", "add_k_proj") if keys else ())):
            layer = getattr(network.get_submodule(name), child, None)
            if layer is not None:
                hooks.append(layer.register_forward_hook(lambda module, args, out: torch.cat([out[:2], out[:2]])))
    expected = decode(parts, None)[-1]
    for hook in hooks:
        hook.remove()
    settings = Injection(inject=1.0, blocks_from=half[0], blocks_to=half[1], keys=keys, text=True, blend=False)
    close(decode(parts, control_of(parts, settings))[-1], expected)


def test_pictures_alone_leave_the_prompts_tokens_their_own(flow_layouts):
    """In a block with two streams, the picture's projections are the only ones exchanged."""
    parts = Parts.load(Family(str(flow_layouts["flux"])))
    first = parts.model.network.transformer_blocks[0].attn
    hooks = [
        layer.register_forward_hook(lambda module, args, out: torch.cat([out[:2], out[:2]]))
        for layer in (first.to_k, first.to_v)
    ]
    expected = decode(parts, None)[-1]
    for hook in hooks:
        hook.remove()
    close(decode(parts, control_of(parts, Injection(inject=1.0, blocks_to=0.25, blend=False)))[-1], expected)


def test_outside_of_what_the_words_attend_to_is_the_source(parts):
    """By whole patches of 2 x 2; and all of it is free where nothing blends yet."""
    settings = Injection(inject=0.0, blend=("star", "red"), blend_threshold=0.999, blend_from=0.4)
    targets = ["red star red", "red"]
    plain, found = (decode(parts, control, targets) for control in (None, control_of(parts, settings, targets)))
    close(found[0], plain[0])
    for x in found[1:]:
        kept = (x[2:] == x[:2]).all(1)
        assert 0 < kept[0].float().mean() < 1
        assert torch.equal(kept, kept[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_nothing_is_left_behind_and_steps_are_counted(parts):
    network, control = parts.model.network, control_of(parts, Injection())
    before = {name: network.get_submodule(name).processor for name in joint_layers(network)}
    decode(parts, control)
    assert {name: network.get_submodule(name).processor for name in before} == before
    told = parts.conditioner([*SOURCES, *TARGETS])
    with torch.no_grad(), control.attached(network):
        parts.split(noise().repeat(2, 1, 1, 1), 999, told)
        with pytest.raises(ValueError, match="evaluated twice in one step"):
            parts.split(noise().repeat(2, 1, 1, 1), 999, told)
        with pytest.raises(ValueError, match="already changed by JointAttention"), control.attached(network):
            pass
        control.step(noise().repeat(2, 1, 1, 1))
        with pytest.raises(ValueError, match="the network got a batch of 2 while attention of 4 rows"):
            parts.split(noise(), 999, told[:2])


def test_unconditional_rows_are_left_alone(parts):
    x, told = noise().repeat(3, 1, 1, 1), parts.conditioner(["", "", *SOURCES, *TARGETS])
    with torch.no_grad():
        plain = parts.split(x, 749, told).eps
        with control_of(parts, WHOLE).attached(parts.model.network):
            found = parts.split(x, 749, told).eps
    close(found[:4], plain[:4])
    assert not torch.allclose(found[4:], plain[4:], atol=1e-4)


# Which control suits which network


def test_a_control_of_another_kind_of_network_is_refused(parts, layouts):
    unet = UNet2DConditionModel.from_pretrained(layouts["sd15"], subfolder="unet")
    assert (usual_control(parts.model.network), usual_control(unet)) == (Injection(), PromptToPrompt())
    with pytest.raises(ValueError, match="which UNet2DConditionModel has not: borrow by PromptToPrompt on a"):
        control_of(parts, WHOLE).changes(unet)
    edits = (SOURCES, TARGETS, noise())
    control = PromptToPromptControl(PromptToPrompt(), *edits, tokenizer=parts.conditioner.tokenizer, num_steps=3)
    with pytest.raises(ValueError, match="Transformer2DModel does not have: borrow by an Injection on FLUX and SD3"):
        control.changes(parts.model.network)


def test_an_attention_that_torch_does_not_compute_is_refused():
    processor = JointAttention(lambda attn, hidden, text: hidden, lambda text: lambda q, k, v: (k, v))
    with pytest.raises(ValueError, match=r"choose torch's own, set_attention_backend\('native'\)"):
        processor(nn.Identity(), torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inject": float("nan")}, "inject nan is no fraction"),
        ({"blocks_from": 1.5}, "blocks_from 1.5 is no fraction"),
        ({"blocks_from": 0.5, "blocks_to": 0.5}, "blocks_from 0.5 must be less than blocks_to 0.5"),
        ({"blend": "cat dog"}, "blend 'cat dog' is neither True, False nor the words"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Injection(**settings)


# Who takes one


def edit_by(flow_layouts, make: Callable[[Family], object]) -> tuple[object, Tensor]:
    method = make(Family(str(flow_layouts["flux"])))
    return method, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("merge", [True, False])
def test_students_of_a_transformer_borrow_by_injection(flow_layouts, merge):
    """Also where their weights are merged, which exchanges the layers that attention calls."""

    def make(family: Family) -> AttentionControlled:
        torch.manual_seed(0)
        students = LoraStudents(family.load_model(guided=True))
        for direction in ("forward", "reverse"):
            for weight in students.parameters_of(direction):
                nn.init.normal_(weight, std=0.1)
        parts = (family.load_autoencoder(), family.load_conditioner(), Boundaries((0, 499, 999)))
        return AttentionControlled(students, *parts, merge=merge)

    method, images = edit_by(flow_layouts, make)
    assert method.control == Injection()
    told, steps = {"guidance": StepGuidance(3.0)}, list[Step]()
    edited = method.edit(images, SOURCES, TARGETS, on_step=steps.append, **told)
    assert sum(step.nfe for step in steps) == 2 + 4
    other = method.edit(images, SOURCES, TARGETS, inject=0.0, **told)
    assert not torch.allclose(edited, other, atol=1e-4)
    with pytest.raises(ValueError, match="edits have no cross_replace; what they borrow: inject, blocks_from"):
        method.edit(images, SOURCES, TARGETS, cross_replace=0.2, **told)


def test_baselines_share_values_by_default(flow_layouts):
    method, images = edit_by(flow_layouts, lambda family: RFSolverEdit(Parts.load(family), num_inference_steps=4))
    shared = method.edit(images, SOURCES, TARGETS)
    assert not torch.allclose(shared, method.edit(images, SOURCES, TARGETS, control=None), atol=1e-4)
    assert torch.equal(shared, method.edit(images, SOURCES, TARGETS, control=method.control))
