"""One UNet, two adapters, three denoisers: what each of them computes, and what is refused."""

import copy
import pickle

import pytest
import torch
from students_case import (
    ADAPTERS,
    LORA,
    gradients,
    loss_of,
    part,
    run,
    separate_unet,
    tiny_batch,
    tiny_students,
    tiny_unet,
)

from icd_lightning.diffusion.guidance import ConstantGuidance
from icd_lightning.diffusion.schedule import NoiseSchedule
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.students import LoraSettings, Students


@pytest.fixture
def students():
    return tiny_students()


@pytest.fixture
def batch():
    return tiny_batch()


def output(students, adapter, batch):
    return students.predict(adapter, batch["x"], batch["t"], Conditioning(batch["prompt_embeds"]), batch["w"])


@torch.no_grad()
def test_with_adapters_off_it_is_the_plain_unet_bit_for_bit(students, batch):
    assert torch.equal(output(students, None, batch), run(tiny_unet(), batch))


@torch.no_grad()
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_computes_what_a_model_with_it_alone_does_bit_for_bit(students, batch, adapter):
    expected = run(separate_unet(students, adapter), batch)
    assert torch.equal(output(students, adapter, batch), expected)
    assert not torch.allclose(expected, output(students, None, batch), atol=1e-2)


@torch.no_grad()
def test_new_students_are_the_teacher(batch):
    students = Students(tiny_unet(), NoiseSchedule(), lora=LORA)
    assert all(torch.equal(output(students, adapter, batch), output(students, None, batch)) for adapter in ADAPTERS)


def test_the_default_lora_is_that_of_the_released_students():
    assert (LoraSettings().rank, LoraSettings().alpha, len(LoraSettings().target_modules)) == (64, 8, 14)
    with pytest.raises(ValueError, match="rank 0"):
        LoraSettings(rank=0)


@torch.no_grad()
def test_guidance_is_a_number_a_tensor_or_a_schedule(students, batch):
    conditioning = Conditioning(batch["prompt_embeds"])
    forms = (5.0, torch.full((4,), 5.0), ConstantGuidance(5.0))
    eps = [students.reverse_model(conditioning, guidance)(batch["x"], batch["t"]) for guidance in forms]
    assert torch.equal(eps[0], eps[1])
    assert torch.equal(eps[0], eps[2])
    assert not torch.equal(eps[0], students.reverse_model(conditioning, 1.0)(batch["x"], batch["t"]))
    assert students.reverse_model(conditioning, 5.0).nfe == 1


@torch.no_grad()
def test_a_v_prediction_network_is_a_denoiser_of_eps(batch):
    schedule = NoiseSchedule(prediction_type="v_prediction")
    students = Students(tiny_unet(), schedule, lora=LORA)
    eps = students.teacher(Conditioning(batch["prompt_embeds"]), batch["w"])(batch["x"], batch["t"])
    assert torch.equal(eps, schedule.eps_from_output(run(tiny_unet(), batch), batch["x"], batch["t"]))


def test_only_the_students_have_gradients(students, batch):
    conditioning = Conditioning(batch["prompt_embeds"])
    assert not students.teacher(conditioning, 1.0)(batch["x"], batch["t"]).requires_grad
    assert students.forward_model(conditioning)(batch["x"], batch["t"]).requires_grad
    assert students.reverse_model(conditioning, 3.0)(batch["x"], batch["t"]).requires_grad
    with torch.no_grad():
        assert not students.reverse_model(conditioning, 3.0)(batch["x"], batch["t"]).requires_grad


def test_training_moves_the_adapters_and_nothing_else(batch):
    students = tiny_students().train()
    before = {name: p.detach().clone() for name, p in students.named_parameters()}
    parameters = [p for adapter in ADAPTERS for p in students.parameters_of(adapter)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sum(loss_of(students, adapter, batch) for adapter in ADAPTERS).backward()
        optimizer.step()
    trained = {id(p) for p in parameters}
    for name, parameter in students.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad == (id(parameter) in trained) == (parameter.grad is not None), name


def test_using_nests_and_restores_whatever_happens(students):
    with students.using("cd"):
        with pytest.raises(RuntimeError, match="boom"), students.using("fcd"):
            raise RuntimeError("boom")
        assert students.active == "cd"
        with students.using(None):
            assert students.active is None
        assert students.active == "cd"
    assert students.active is None
    assert all(p.requires_grad for adapter in ADAPTERS for p in students.parameters_of(adapter))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda students: pickle.loads(pickle.dumps(students))])
def test_a_copy_switches_by_itself(batch, duplicate):
    students = tiny_students(gradient_checkpointing=True)
    twin = duplicate(students)
    with students.using("fcd"):
        loss = loss_of(twin, "cd", batch)
    loss.backward()
    loss_of(students, "cd", batch).backward()
    assert all(torch.equal(g, gradients(students, "cd")[name]) for name, g in gradients(twin, "cd").items())
    assert all(gradient is None for adapter in ADAPTERS for gradient in gradients(twin, "fcd").values())


def test_a_half_precision_base_keeps_float32_students(batch):
    half = tiny_students(unet=tiny_unet().to(torch.bfloat16))
    full = tiny_students(unet=tiny_unet().to(torch.bfloat16).float())
    assert half.unet.conv_in.weight.dtype == torch.bfloat16
    for adapter in ADAPTERS:
        assert all(p.dtype == torch.float32 for p in half.parameters_of(adapter))
        eps = half.denoiser(adapter, Conditioning(batch["prompt_embeds"]), batch["w"])(batch["x"], batch["t"])
        assert eps.dtype == torch.float32
        loss_of(half, adapter, batch).backward()
        loss_of(full, adapter, batch).backward()
        found, expected = (
            torch.cat([p.grad.flatten() for p in which.parameters_of(adapter)]) for which in (half, full)
        )
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_students_cast_to_half_precision_are_refused(students):
    with pytest.raises(ValueError, match=r"'cd' was cast to torch.bfloat16.*bf16-mixed"):
        students.to(torch.bfloat16).parameters_of("cd")


def test_a_unet_without_guidance_embedding_is_refused():
    with pytest.raises(ValueError, match=r"time_cond_proj_dim.*add_guidance_embedding"):
        Students(tiny_unet(time_cond_proj_dim=None), NoiseSchedule())


def test_the_guidance_embedding_cannot_be_left_out(students, batch):
    with pytest.raises(ValueError, match="timestep_cond"):
        students.unet(batch["x"], batch["t"], batch["prompt_embeds"])
    with pytest.raises(ValueError, match="needs a guidance scale"):
        students.predict("cd", batch["x"], batch["t"], Conditioning(batch["prompt_embeds"]), None)


def test_a_unet_with_adapters_is_refused(students):
    with pytest.raises(ValueError, match="already carries adapters"):
        Students(students.unet, NoiseSchedule())


def test_an_unknown_adapter_is_refused(students, batch):
    with pytest.raises(ValueError, match="no adapter 'forward': 'fcd' is the forward model"):
        output(students, "forward", batch)
    with pytest.raises(ValueError, match="no adapter 'reverse'"):
        students.parameters_of("reverse")


@pytest.mark.parametrize("switch", ["set_adapter", "disable_adapters"])
def test_a_switch_by_peft_is_refused_before_it_does_harm(students, batch, switch):
    getattr(students.unet, switch)(*([] if switch == "disable_adapters" else ["fcd"]))
    with pytest.raises(ValueError, match=r"switch by Students.using"):
        output(students, "cd", batch)


def test_a_conditioning_of_another_size_is_refused(students, batch):
    with pytest.raises(ValueError, match="conditioning holds 2 samples, x holds 4"):
        students.teacher(Conditioning(part(batch, slice(2))["prompt_embeds"]), 1.0)(batch["x"], batch["t"])
