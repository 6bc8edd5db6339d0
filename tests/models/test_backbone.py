"""A UNet as a denoiser: classifier-free guidance as defined, and a guidance embedding that begins at zero."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from students_case import run, tiny_batch, tiny_unet
from training_case import same

from icd_lightning.diffusion.guidance import ConstantGuidance, StepGuidance
from icd_lightning.diffusion.schedule import NoiseSchedule
from icd_lightning.models.backbone import (
    add_guidance_embedding,
    cfg_denoiser,
    fold_guidance_embedding,
    guided_denoiser,
    predict,
)
from icd_lightning.models.conditioning import Conditioning

SDXL_LIKE = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 12,
}


@pytest.fixture
def unet():
    """A UNet that knows no guidance and counts the samples of each call."""
    unet = tiny_unet(time_cond_proj_dim=None)
    unet.sizes = []
    unet.register_forward_pre_hook(lambda module, args: module.sizes.append(len(args[0])))
    return unet


@pytest.fixture
def batch():
    return tiny_batch()


def cfg(unet, batch, guidance, **schedule):
    unconditional = Conditioning(torch.zeros_like(batch["prompt_embeds"]))
    conditioning = Conditioning(batch["prompt_embeds"])
    return cfg_denoiser(unet, NoiseSchedule(**schedule), conditioning, unconditional, guidance)


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_classifier_free_guidance_mixes_two_predictions_of_eps(unet, batch, prediction_type):
    denoise = cfg(unet, batch, batch["w"], prediction_type=prediction_type)
    schedule, x, t = denoise.schedule, batch["x"], batch["t"]
    eps_cond = schedule.eps_from_output(run(unet, batch), x, t)
    nothing = {**batch, "prompt_embeds": torch.zeros_like(batch["prompt_embeds"])}
    eps_uncond = schedule.eps_from_output(run(unet, nothing), x, t)
    expected = eps_uncond + batch["w"].view(-1, 1, 1, 1) * (eps_cond - eps_uncond)
    torch.testing.assert_close(denoise(x, t), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_unguided_steps_cost_one_evaluation(unet, batch):
    x, late, early = batch["x"], torch.full((4,), 900), torch.full((4,), 100)
    denoise = cfg(unet, batch, StepGuidance(8.0, tau=0.7))
    plain = cfg(unet, batch, 1.0)
    assert torch.equal(denoise(x, late), plain(x, late))
    assert (denoise.nfe, plain.nfe) == (1, 1)
    denoise(x, early)
    assert denoise.nfe == 2
    denoise(x, torch.tensor([900, 900, 100, 900]))
    assert denoise.nfe == 2
    assert unet.sizes == [4, 4, 8, 8]


@torch.no_grad()
def test_numbers_tensors_and_schedules_guide_alike(unet, batch):
    forms = (3.0, torch.full((4,), 3.0), ConstantGuidance(3.0))
    eps = [cfg(unet, batch, guidance)(batch["x"], batch["t"]) for guidance in forms]
    assert torch.equal(eps[0], eps[1])
    assert torch.equal(eps[0], eps[2])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_guidance_embedding_changes_nothing_yet(batch, dtype):
    unet = tiny_unet(time_cond_proj_dim=None).to(dtype)
    guided = add_guidance_embedding(unet, dim=64)
    assert guided.config.time_cond_proj_dim == 64
    assert all(weight.dtype == dtype for weight in guided.state_dict().values())
    conditioning, x, t = Conditioning(batch["prompt_embeds"]), batch["x"], batch["t"]
    eps = guided_denoiser(guided, NoiseSchedule(), conditioning, batch["w"])(x, t)
    assert torch.equal(eps, predict(unet, x, t, conditioning, None))
    assert eps.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_a_guidance_scale_folds_into_a_unet_without_embedding(batch, w):
    guided = tiny_unet(time_cond_proj_dim=64)
    before = {name: weight.clone() for name, weight in guided.state_dict().items()}
    plain = fold_guidance_embedding(guided, w)
    conditioning, x, t = Conditioning(batch["prompt_embeds"]), batch["x"], batch["t"]
    expected = predict(guided, x, t, conditioning, torch.full((len(x),), w))
    torch.testing.assert_close(predict(plain, x, t, conditioning, None), expected)
    assert not torch.allclose(expected, predict(guided, x, t, conditioning, torch.full((len(x),), w + 1)))
    assert all(torch.equal(weight, before[name]) for name, weight in guided.state_dict().items())


@torch.no_grad()
def test_adding_an_embedding_and_folding_it_gives_the_unet_back():
    unet = tiny_unet(time_cond_proj_dim=None)
    again = fold_guidance_embedding(add_guidance_embedding(unet), 5.0)
    assert again.config.time_cond_proj_dim is None
    assert same(again.state_dict(), unet.state_dict())
    with pytest.raises(ValueError, match="no guidance embedding to fold"):
        fold_guidance_embedding(unet, 1.0)


def test_a_stored_config_that_does_not_mention_the_embedding_gets_one(tmp_path):
    """As those of stock models: diffusers notes such a key as a default, and would drop a value given for it."""
    tiny_unet(time_cond_proj_dim=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["time_cond_proj_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    guided = add_guidance_embedding(UNet2DConditionModel.from_pretrained(tmp_path))
    assert guided.time_embedding.cond_proj.weight.shape[1] == 512


def test_a_new_guidance_embedding_learns_and_is_a_copy(batch):
    unet = tiny_unet(time_cond_proj_dim=None)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    guided = add_guidance_embedding(unet).train()
    denoise = guided_denoiser(guided, NoiseSchedule(), Conditioning(batch["prompt_embeds"]), batch["w"])
    (denoise(batch["x"], batch["t"]) - batch["goal"]).square().mean().backward()
    assert guided.time_embedding.cond_proj.weight.grad.norm() > 0
    torch.optim.SGD(guided.parameters(), lr=0.1).step()
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


@torch.no_grad()
def test_pooled_embeddings_and_time_ids_reach_an_sdxl_like_unet(batch):
    unet = tiny_unet(**SDXL_LIKE)
    time_ids = torch.tensor([[1023.0, 768, 0, 0, 512, 512]] * 4)
    conditioning = Conditioning(batch["prompt_embeds"], torch.randn(4, 12), time_ids)
    cropped = Conditioning(batch["prompt_embeds"], conditioning.pooled_prompt_embeds, time_ids + 100)
    eps = [guided_denoiser(unet, NoiseSchedule(), c, 2.0)(batch["x"], batch["t"]) for c in (conditioning, cropped)]
    assert not torch.allclose(*eps)


def test_the_wrong_denoiser_for_a_unet_is_refused(batch):
    conditioning, x, t = Conditioning(batch["prompt_embeds"]), batch["x"], batch["t"]
    plain, guided = tiny_unet(time_cond_proj_dim=None), tiny_unet()
    with pytest.raises(ValueError, match="use guided_denoiser"):
        cfg(guided, batch, 3.0)
    with pytest.raises(ValueError, match="use cfg_denoiser"):
        guided_denoiser(plain, NoiseSchedule(), conditioning, 3.0)(x, t)
    with pytest.raises(ValueError, match="already has a guidance embedding of width 512"):
        add_guidance_embedding(guided)
    with pytest.raises(ValueError, match="1 unconditional samples for 4 prompts"):
        cfg_denoiser(plain, NoiseSchedule(), conditioning, conditioning[0], 3.0)
