"""The trainings of the tiny family's own parts, through the real Trainer: what is learnt, asked and written."""

import pytest
import torch
from diffusers import AutoencoderDC
from family_case import SCHEDULER, TEXT_ENCODER, UNET, VAE
from torch.nn.functional import cross_entropy
from training_case import frozen_weights, same, trainer_for

from icd_lightning.diffusion import VP, Draws, squared_error
from icd_lightning.models.backbones import Flux
from icd_lightning.models.family import Family
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tiny.datamodule import SceneDataModule, scene_batch
from icd_lightning.tiny.scene_network import SceneNetwork, label_tensor
from icd_lightning.tiny.scenes import ABSENT, LABELS, scene_at
from icd_lightning.tiny.train_autoencoder import AutoencoderTraining
from icd_lightning.tiny.train_scene_network import SceneNetworkTraining
from icd_lightning.tiny.train_teacher import TeacherTraining

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

FAST = OptimizerSettings(lr=3e-3)
BATCH = 8


def fit(task, folder, *, max_steps: int):
    trainer = trainer_for(folder, max_steps=max_steps, limit_val_batches=1)
    trainer.fit(task, datamodule=SceneDataModule(batch_size=BATCH, val_count=BATCH, val_batch_size=BATCH))
    task.export(folder)
    return trainer


def batch():
    """The first of a training."""
    return scene_batch([scene_at(0, i) for i in range(BATCH)], [str(i) for i in range(BATCH)])


def test_the_autoencoder_learns_pixels_from_noised_latents_held_standard(tmp_path):
    task = AutoencoderTraining(VAE, latent_noise=2.0, moment_weight=0.5, optimizer=FAST)
    with torch.no_grad():
        images = batch().images
        latents = task.vae.encode(images).latent
        noised = latents + 2.0 * Draws(0, 0).normal(*latents.shape)
        error = task.vae.decode(noised).sample - images
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        first = error.abs().mean() + error.square().mean()
        first = first + 0.5 * (mean.square().mean() + std.log().square().mean())
    trainer = fit(task, tmp_path, max_steps=1)
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], first, rtol=1e-4, atol=1e-5)
    trainer = fit(task, tmp_path, max_steps=12)
    assert trainer.callback_metrics["train/loss"] < first
    assert same(AutoencoderDC.from_pretrained(tmp_path / "vae").state_dict(), task.vae.state_dict())


def test_the_scene_network_learns_what_scenes_say_and_nothing_of_what_they_lack(tmp_path):
    task, first = SceneNetworkTraining((8, 8, 16, 16), 16, image_noise=0.2, optimizer=FAST), batch()
    images = first.images + 0.2 * Draws(0, 0).normal(*first.images.shape)
    truth = label_tensor([scene_at(0, i) for i in range(BATCH)])

    @torch.no_grad()
    def loss() -> torch.Tensor:
        logits = task.network(images)
        there = [(name, truth[:, i]) for i, name in enumerate(LABELS) if (truth[:, i] != ABSENT).any()]
        return sum(cross_entropy(logits[name], labels, ignore_index=ABSENT) for name, labels in there)

    before = loss()
    trainer = fit(task, tmp_path, max_steps=1)
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], before, rtol=1e-4, atol=1e-5)
    fit(task, tmp_path, max_steps=10)
    assert loss() < before
    loaded = SceneNetwork.from_pretrained(tmp_path / "scene_network")
    assert same(loaded.state_dict(), task.network.state_dict())


@pytest.fixture
def teacher(random_family):
    settings = {"text_encoder": TEXT_ENCODER, "caption_dropout": 0.5, "optimizer": FAST, "seed": 1}
    return TeacherTraining(Family(str(random_family)), UNET, SCHEDULER, **settings)


def test_the_teacher_learns_v_of_noised_latents_with_half_of_the_captions(teacher, tmp_path):
    """What the network was told in the first step, and the loss by hand from its output."""
    calls: list[tuple] = []
    prompts: list[str] = []
    encode = teacher.conditioner.forward
    teacher.conditioner.forward = lambda texts, framing=None: prompts.extend(texts) or encode(texts, framing)
    teacher.network.register_forward_hook(lambda network, args, output: calls.append((*args[:2], output[0].detach())))
    frozen = frozen_weights(teacher)
    trainer = fit(teacher, tmp_path, max_steps=1)
    (x, t, output), process = calls[0], VP(prediction_type="v_prediction")
    latents = teacher.autoencoder.encode(batch().images)
    noise = process.eps_from_x0(x, latents, t)
    loss = squared_error(output, process.target(latents, noise, t)).mean()
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], loss, rtol=1e-3, atol=1e-3)
    assert 1 <= prompts[:BATCH].count("") < BATCH
    assert all(prompt in ("", caption) for prompt, caption in zip(prompts[:BATCH], batch().captions, strict=True))
    assert same(frozen_weights(teacher), frozen)


def test_the_teacher_sees_all_timesteps_and_most_of_them_near_the_data_and_where_words_show(teacher):
    t = teacher._timesteps(4000, Draws(0, 0))
    assert t.min() < 20
    assert t.max() > 980
    assert t.dtype == torch.long
    assert (t < 200).float().mean() > 0.27, "uniform would be 0.2"
    assert ((t > 500) & (t < 800)).float().mean() > 0.23, "uniform in place of the middle's draws would leave 0.2"


def test_what_the_teacher_exports_is_a_family(teacher, random_family, tmp_path):
    fit(teacher, tmp_path, max_steps=2)
    (tmp_path / "vae").symlink_to(random_family / "vae")
    family = Family(str(tmp_path))
    model, conditioner = family.load_model(guided=False), family.load_conditioner()
    assert model.process.prediction_type == "v_prediction"
    assert same(model.network.state_dict(), teacher.network.state_dict())
    caption = ["a small red circle on a blue background"]
    expected = teacher.conditioner(caption).tensors["prompt_embeds"]
    assert torch.equal(conditioner(caption).tensors["prompt_embeds"], expected)


FLUX = {
    **{"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2},
    **{"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
}


@pytest.fixture
def flow_teacher(random_family):
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    family = Family(str(random_family), backbone=Flux())
    return TeacherTraining(family, FLUX, scheduler, guidance_scales=(1.0, 3.0), balance=0.5, optimizer=FAST)


def test_a_teacher_that_takes_w_learns_the_velocity_and_what_guidance_adds_to_it(flow_teacher, tmp_path):
    """The loss of the first step by hand, from what the network was told in its two calls: w 1 held, then all w."""
    calls: list[tuple] = []
    flow_teacher.network.register_forward_hook(
        lambda network, args, kwargs, output: calls.append((args[0], args[3], kwargs["guidance"], output[0].detach())),
        with_kwargs=True,
    )
    frozen = frozen_weights(flow_teacher)
    trainer = fit(flow_teacher, tmp_path, max_steps=1)
    (_, _, held, output), (x, t, w, predicted) = calls[:2]
    assert set(held.tolist()) == {1.0}
    assert set(w.tolist()) == {1.0, 3.0}
    x, predicted, output = (tokens.mT.unflatten(2, (8, 8)) for tokens in (x, predicted, output))
    latents, sigma = flow_teacher.autoencoder.encode(batch().images), t.view(-1, 1, 1, 1)
    target = (x - latents) / sigma  # noise - data
    conditional, unconditional = output.chunk(2)
    target[w == 3] += 2 * (conditional - unconditional)
    loss = (squared_error(predicted, target) / (1 + 0.5 * (w - 1) ** 2)).mean()
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], loss, rtol=1e-3, atol=1e-3)
    assert same(frozen_weights(flow_teacher), frozen), "autoencoder and text side stay as they are"


def test_what_such_a_teacher_exports_is_a_family_of_the_others_parts_and_needs_no_stage_one(
    flow_teacher, random_family, tmp_path
):
    fit(flow_teacher, tmp_path, max_steps=1)
    family, base = Family(str(tmp_path)), Family(str(random_family))
    assert not (tmp_path / "vae").exists()
    model = family.load_model(guided=True)
    assert model.takes_guidance
    assert same(model.network.state_dict(), flow_teacher.network.state_dict())
    assert family.resolution == base.resolution == 64
    assert family.load_autoencoder().fingerprint == base.load_autoencoder().fingerprint
    prompts = ["a small red circle on a blue background"]
    assert same(family.load_conditioner()(prompts).tensors, flow_teacher.conditioner(prompts).tensors)
