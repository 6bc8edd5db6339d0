"""One network, two adapters, three denoisers: what each of them computes, and what is refused."""

import copy
import pickle

import pytest
import torch
from students_case import (
    LORA,
    gradients,
    loss_of,
    output_of,
    run,
    separate_unet,
    tiny_batch,
    tiny_model,
    tiny_students,
    tiny_unet,
)

from icd_lightning.diffusion import VP, StepGuidance
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.students import DIRECTIONS, FullStudents, LoraSettings, LoraStudents


@pytest.fixture
def students():
    return tiny_students()


@pytest.fixture
def batch():
    return tiny_batch()


@torch.no_grad()
def test_with_adapters_off_it_is_the_plain_network_bit_for_bit(students, batch):
    assert torch.equal(output_of(students, "teacher", batch), run(tiny_unet(), batch))


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_adapter_computes_what_a_model_with_it_alone_does_bit_for_bit(students, batch, direction):
    expected = run(separate_unet(students, direction), batch)
    assert torch.equal(output_of(students, direction, batch), expected)
    assert not torch.allclose(expected, output_of(students, "teacher", batch), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", [LoraStudents, FullStudents])
def test_new_students_are_the_teacher(batch, kind):
    students = kind(tiny_model())
    teacher = output_of(students, "teacher", batch)
    assert all(torch.equal(output_of(students, direction, batch), teacher) for direction in DIRECTIONS)


def test_the_defaults_are_those_of_the_released_students():
    assert (LoraSettings().rank, LoraSettings().alpha, len(tiny_model().backbone.lora_targets)) == (64, 8, 14)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"alpha": float("nan")}])
def test_lora_of_no_size_is_refused(wrong):
    with pytest.raises(ValueError, match="must be positive and finite"):
        LoraSettings(**wrong)


def test_lora_of_no_layer_is_refused():
    with pytest.raises(ValueError, match="target_modules are none: name layers, or leave it out for the usual ones"):
        LoraSettings(target_modules=())


def test_lora_targets_that_match_no_layer_are_one_error():
    with pytest.raises(
        ValueError, match=r"no layer of UNet2DConditionModel is named like the LoRA target_modules to_nothing, q: name"
    ):
        LoraStudents(tiny_model(), lora=LoraSettings(target_modules=("to_nothing", "q")))


@torch.no_grad()
def test_guidance_is_a_number_a_tensor_or_a_schedule(students, batch):
    conditioning = Conditioning(prompt_embeds=batch["prompt_embeds"])
    forms = (5.0, torch.full((4,), 5.0), StepGuidance(5.0))
    eps = [students.denoiser("reverse", conditioning, guidance)(batch["x"], batch["t"]).eps for guidance in forms]
    assert torch.equal(eps[0], eps[1])
    assert torch.equal(eps[0], eps[2])
    assert not torch.equal(eps[0], students.denoiser("reverse", conditioning, 1.0)(batch["x"], batch["t"]).eps)


@torch.no_grad()
def test_a_v_prediction_network_is_split_as_such(batch):
    process = VP(prediction_type="v_prediction")
    students = LoraStudents(tiny_model(process=process), lora=LORA)
    conditioning = Conditioning(prompt_embeds=batch["prompt_embeds"])
    found = students.denoiser("teacher", conditioning, batch["w"])(batch["x"], batch["t"])
    expected = process.split(run(tiny_unet(), batch), batch["x"], batch["t"])
    assert torch.equal(found.x0, expected.x0)
    assert torch.equal(found.eps, expected.eps)


@pytest.mark.parametrize("kind", [LoraStudents, FullStudents])
def test_only_the_students_have_gradients(batch, kind):
    students, conditioning = kind(tiny_model()), Conditioning(prompt_embeds=batch["prompt_embeds"])
    landed = batch["x"].clone().requires_grad_()  # as a student's jump
    assert not students.denoiser("teacher", conditioning, 1.0)(landed, batch["t"]).eps.requires_grad
    assert students.denoiser("forward", conditioning, 1.0)(batch["x"], batch["t"]).eps.requires_grad
    assert students.denoiser("reverse", conditioning, 3.0)(batch["x"], batch["t"]).x0.requires_grad
    students.freeze("forward")
    assert not any(parameter.requires_grad for parameter in students.parameters_of("forward"))
    assert all(parameter.requires_grad for parameter in students.parameters_of("reverse"))


@pytest.mark.parametrize("kind", [LoraStudents, FullStudents])
def test_training_moves_the_students_and_nothing_else(batch, kind):
    students = kind(tiny_model()).train()
    before = {name: p.detach().clone() for name, p in students.named_parameters()}
    trained = {id(p) for direction in DIRECTIONS for p in students.parameters_of(direction)}
    optimizer = torch.optim.AdamW([p for p in students.parameters() if id(p) in trained], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sum(loss_of(students, direction, batch) for direction in DIRECTIONS).backward()
        optimizer.step()
    for name, parameter in students.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad == (id(parameter) in trained) == (parameter.grad is not None), name


def test_using_nests_and_restores_whatever_happens(students):
    with students.using("reverse"):
        with pytest.raises(RuntimeError, match="boom"), students.using("forward"):
            raise RuntimeError("boom")
        assert students.active == "reverse"
        with students.using("teacher"):
            assert students.active == "teacher"
        assert students.active == "reverse"
    assert students.active == "teacher"
    assert all(p.requires_grad for direction in DIRECTIONS for p in students.parameters_of(direction))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda students: pickle.loads(pickle.dumps(students))])
def test_a_copy_switches_by_itself(batch, duplicate):
    students = tiny_students(gradient_checkpointing=True)
    twin = duplicate(students)
    with students.using("forward"):
        loss = loss_of(twin, "reverse", batch)
    loss.backward()
    loss_of(students, "reverse", batch).backward()
    assert all(torch.equal(g, gradients(students, "reverse")[name]) for name, g in gradients(twin, "reverse").items())
    assert all(g is None for each in (students, twin) for g in gradients(each, "forward").values())


def test_a_half_precision_base_keeps_float32_students(batch):
    half = tiny_students(unet=tiny_unet().to(torch.bfloat16))
    full = tiny_students(unet=tiny_unet().to(torch.bfloat16).float())
    assert half.network.conv_in.weight.dtype == torch.bfloat16
    for direction in DIRECTIONS:
        denoise = half.denoiser(direction, Conditioning(prompt_embeds=batch["prompt_embeds"]), batch["w"])
        assert denoise(batch["x"], batch["t"]).eps.dtype == torch.float32
        loss_of(half, direction, batch).backward()
        loss_of(full, direction, batch).backward()
        found, expected = (
            torch.cat([p.grad.flatten() for p in which.parameters_of(direction)]) for which in (half, full)
        )
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()


# What is refused


def test_students_cast_to_half_precision_are_refused(students):
    with pytest.raises(ValueError, match=r"reverse model was cast to torch.bfloat16.*bf16-mixed"):
        students.to(torch.bfloat16).parameters_of("reverse")


@pytest.mark.parametrize("kind", [LoraStudents, FullStudents])
def test_a_teacher_without_guidance_embedding_is_refused(kind):
    with pytest.raises(ValueError, match=r"needs a guidance embedding.*with_guidance_embedding\(\)"):
        kind(tiny_model(tiny_unet(time_cond_proj_dim=None)))


def test_copies_of_a_teacher_in_fewer_bits_are_refused():
    class InFewerBits(torch.Tensor):
        """As torchao's tensors, of a class of its own."""

    model = tiny_model()
    layer = model.network.time_embedding.linear_1
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(InFewerBits), requires_grad=False)
    with pytest.raises(ValueError, match=r"leave out family.quantization, or take LoraStudents"):
        FullStudents(model)
    LoraStudents(model)


def test_the_guidance_embedding_cannot_be_left_out(students, batch):
    with pytest.raises(ValueError, match="timestep_cond"):
        students.network(batch["x"], batch["t"], batch["prompt_embeds"])
    with pytest.raises(ValueError, match="needs a guidance scale"):
        output_of(students, "reverse", {**batch, "w": None})


def test_a_network_with_adapters_is_refused(students):
    with pytest.raises(ValueError, match="already carries adapters"):
        LoraStudents(students.model)


@pytest.mark.parametrize("switch", ["set_adapter", "disable_adapters"])
def test_a_switch_by_peft_is_refused_before_it_does_harm(students, batch, switch):
    getattr(students.network, switch)(*([] if switch == "disable_adapters" else ["fcd"]))
    with pytest.raises(ValueError, match=r"switch by LoraStudents.using"):
        output_of(students, "reverse", batch)


# --- what an adapted layer does: as peft's own, with less to move -----------------------------------------------------


@pytest.mark.parametrize("form", ["float32", "half precision", "autocast"])
def test_an_adapted_layer_is_as_pefts_own_and_never_widens_its_input(batch, form):
    network = tiny_unet() if form == "float32" else tiny_unet().bfloat16()
    students = tiny_students(unet=network, lora=LoraSettings(rank=3, alpha=5))
    seen = set()
    for layer in students._layers.values():
        layer.lora_A["cd"].register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    found = {}
    for variant in ("ours", "peft"):
        if variant == "peft":
            assert seen == {torch.bfloat16 if form == "autocast" else torch.float32}
            for layer in students._layers.values():
                layer.lora_variant.clear()
                layer.cast_input_dtype_enabled = True
        students.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            output = output_of(students, "reverse", batch)
        output.square().mean().backward()
        found[variant] = {"": output.detach(), **gradients(students, "reverse")}
    tolerance = 1e-4 if form == "float32" else 0.25  # bfloat16 rounds what nearly cancels
    for name, ours in found["ours"].items():
        theirs = found["peft"][name]
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_a_student_and_takes_it_out_again(students, batch, safe):
    expected, teacher = (output_of(students, role, batch) for role in ("reverse", "teacher"))
    layers = students._layers.values()
    for layer in layers:
        layer.merge(safe_merge=safe, adapter_names=["cd"])
    torch.testing.assert_close(output_of(students, "teacher", batch), expected, rtol=1e-4, atol=1e-4)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(output_of(students, "teacher", batch), teacher, rtol=1e-4, atol=1e-4)


def test_students_run_on_no_device_at_all(students, batch):
    """Shapes and FLOPs are counted on meta, which knows no autocast."""
    students.to("meta")
    told = {name: value.to("meta") for name, value in batch.items()}
    assert output_of(students, "reverse", told).shape == batch["x"].shape
