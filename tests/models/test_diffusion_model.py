"""A network as a denoiser: classifier-free guidance as defined, and a guidance embedding that begins at zero."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from students_case import run, tiny_batch, tiny_model, tiny_unet
from training_case import same

from icd_lightning.diffusion import VP, Split, StepGuidance
from icd_lightning.models.backbones import UNet
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


def conditioning_of(batch) -> Conditioning:
    return Conditioning(prompt_embeds=batch["prompt_embeds"])


def cfg(unet, batch, guidance, **process):
    unconditional = Conditioning(prompt_embeds=torch.zeros_like(batch["prompt_embeds"]))
    return tiny_model(unet, VP(**process)).denoiser(conditioning_of(batch), guidance, unconditional)


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_classifier_free_guidance_mixes_two_predictions(unet, batch, prediction_type):
    denoise = cfg(unet, batch, batch["w"], prediction_type=prediction_type)
    process, x, t, w = denoise.process, batch["x"], batch["t"], batch["w"].view(-1, 1, 1, 1)
    nothing = {**batch, "prompt_embeds": torch.zeros_like(batch["prompt_embeds"])}
    conditional, unconditional = (process.split(run(unet, each), x, t) for each in (batch, nothing))
    expected = Split(*(u + w * (c - u) for c, u in zip(conditional, unconditional, strict=True)))
    torch.testing.assert_close(denoise(x, t), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unguided_steps_cost_one_evaluation(unet, batch):
    x, late, early = batch["x"], torch.full((4,), 900), torch.full((4,), 100)
    denoise = cfg(unet, batch, StepGuidance(8.0, tau=0.7))
    plain = cfg(unet, batch, 1.0)
    assert torch.equal(denoise(x, late).eps, plain(x, late).eps)
    assert (denoise.nfe, plain.nfe) == (1, 1)
    denoise(x, early)
    assert denoise.nfe == 2
    denoise(x, torch.tensor([900, 900, 100, 900]))
    assert denoise.nfe == 2
    assert unet.sizes == [4, 4, 8, 8]


@torch.no_grad()
def test_numbers_tensors_and_schedules_guide_alike(unet, batch):
    forms = (3.0, torch.full((4,), 3.0), StepGuidance(3.0))
    eps = [cfg(unet, batch, guidance)(batch["x"], batch["t"]).eps for guidance in forms]
    assert torch.equal(eps[0], eps[1])
    assert torch.equal(eps[0], eps[2])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_guidance_embedding_changes_nothing_yet(batch, dtype):
    plain = tiny_model(tiny_unet(time_cond_proj_dim=None).to(dtype))
    guided = plain.with_guidance_embedding(64)
    assert (plain.takes_guidance, guided.takes_guidance) == (False, True)
    assert guided.backbone.guidance_width(guided.network) == 64
    assert all(weight.dtype == dtype for weight in guided.network.state_dict().values())
    told = batch["x"], batch["t"], conditioning_of(batch)
    output = guided.predict(*told, batch["w"])
    assert torch.equal(output, plain.predict(*told, None))
    assert output.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_a_guidance_scale_folds_into_a_unet_without_embedding(batch, w):
    guided = tiny_unet(time_cond_proj_dim=64)
    before = {name: weight.clone() for name, weight in guided.state_dict().items()}
    plain = UNet().fold_guidance_embedding(guided, w)
    told = batch["x"], batch["t"], conditioning_of(batch)
    expected, other = (tiny_model(guided).predict(*told, torch.full((4,), scale)) for scale in (w, w + 1))
    torch.testing.assert_close(tiny_model(plain).predict(*told, None), expected)
    assert not torch.allclose(expected, other)
    assert same(guided.state_dict(), before)


def test_a_stored_config_that_does_not_mention_the_embedding_gets_one(tmp_path):
    """As those of stock models: diffusers notes such a key as a default, and would drop a value given for it."""
    tiny_unet(time_cond_proj_dim=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["time_cond_proj_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    guided = UNet().add_guidance_embedding(UNet2DConditionModel.from_pretrained(tmp_path))
    assert guided.time_embedding.cond_proj.weight.shape[1] == 512


def test_a_new_guidance_embedding_learns_and_is_a_copy(batch):
    unet = tiny_unet(time_cond_proj_dim=None)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    guided = tiny_model(unet).with_guidance_embedding()
    denoise = guided.denoiser(conditioning_of(batch), batch["w"])
    (denoise(batch["x"], batch["t"]).eps - batch["goal"]).square().mean().backward()
    assert guided.network.time_embedding.cond_proj.weight.grad.norm() > 0
    torch.optim.SGD(guided.network.parameters(), lr=0.1).step()
    assert same(unet.state_dict(), before)


@torch.no_grad()
@pytest.mark.parametrize("changed", ["pooled_prompt_embeds", "time_ids"])
def test_pooled_embeddings_and_time_ids_reach_an_sdxl_like_unet(batch, changed):
    model = tiny_model(tiny_unet(**SDXL_LIKE))
    added = {"pooled_prompt_embeds": torch.randn(4, 12), "time_ids": torch.tensor([[1023.0, 768, 0, 0, 512, 512]] * 4)}
    conditioning = Conditioning(prompt_embeds=batch["prompt_embeds"], **added)
    other = conditioning.replace(**{changed: added[changed] + 100})
    outputs = [model.predict(batch["x"], batch["t"], each, batch["w"]) for each in (conditioning, other)]
    assert not torch.allclose(*outputs)


def test_a_use_that_does_not_fit_the_network_is_refused(batch):
    conditioning, x, t = conditioning_of(batch), batch["x"], batch["t"]
    plain, guided = tiny_model(tiny_unet(time_cond_proj_dim=None)), tiny_model()
    with pytest.raises(ValueError, match="has a guidance embedding and needs a guidance scale"):
        guided.predict(x, t, conditioning, None)
    with pytest.raises(ValueError, match=r"has no guidance embedding: .*with_guidance_embedding"):
        plain.predict(x, t, conditioning, batch["w"])
    with pytest.raises(ValueError, match="needs unconditional prompts"):
        plain.denoiser(conditioning, 3.0)
    with pytest.raises(ValueError, match="already has a guidance embedding"):
        guided.with_guidance_embedding()
    with pytest.raises(ValueError, match="1 unconditional samples for 4 prompts"):
        plain.denoiser(conditioning, 3.0, conditioning[0])
    with pytest.raises(ValueError, match="conditioning holds 2 samples, x holds 4"):
        guided.denoiser(conditioning[:2], 1.0)(x, t)
