"""What a training by the real Trainer gives to the networks: captions, framings, timesteps, latents, scales."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from training_case import FEW, distillation, scenes_data, trainer_for

from icd_lightning.diffusion import Draws
from icd_lightning.models.backbones.unet import UNet
from icd_lightning.models.family import Family
from icd_lightning.models.students import LoraSettings, LoraStudents
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


class Watched:
    """Everything that a network is called with from now on."""

    def __init__(self, network: nn.Module) -> None:
        self.calls: list[dict] = []
        network.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls.append({"x": args[0], "t": args[1], **kwargs})

    def all(self, name: str) -> Tensor:
        """This argument of all calls, joined along the batch."""
        return torch.cat([call[name] for call in self.calls])


def fit(task, scenes, folder, *, max_steps: int = 1, **data) -> None:
    trainer_for(folder, max_steps=max_steps).fit(task, datamodule=scenes_data(scenes, **data))


def stage_one(family: Family, **options) -> GuidanceDistillation:
    return GuidanceDistillation(family, (1.0, 3.0), **options)


def test_stage_one_asks_both_networks_at_timesteps_from_end_to_end(random_family, scenes, tmp_path):
    task = stage_one(Family(str(random_family)))
    teacher, student = Watched(task.teacher), Watched(task.student)
    fit(task, scenes, tmp_path, max_steps=8, batch_size=8)
    t = student.all("t")
    assert torch.equal(teacher.all("t").view(8, 2, 8)[:, 0].flatten(), t), "both halves of the guided teacher"
    assert len(t) == 64
    assert t.min() < 100
    assert t.max() > 900
    assert 400 < t.float().mean() < 600


def test_captions_reach_the_network_and_dropped_ones_are_the_empty_prompt(random_family, scenes, tmp_path):
    """As many as the share says, and only in training."""
    task = distillation(random_family, students=FEW, caption_dropout=0.5)
    captions: list[str] = []
    encode = task.conditioner.forward
    task.conditioner.forward = lambda prompts, framing=None: captions.extend(prompts) or encode(prompts, framing)
    watched = Watched(task.students.network)
    fit(task, scenes, tmp_path, max_steps=4, batch_size=6)
    empty = [caption == "" for caption in captions]
    assert len(captions) == 24
    assert 6 <= sum(empty) <= 18
    embeds = encode(captions[:6]).tensors["prompt_embeds"]
    assert torch.equal(watched.calls[0]["encoder_hidden_states"], torch.cat([embeds, embeds]))


@torch.no_grad()
def test_the_alpha_of_the_settings_scales_what_adapters_add(random_family):
    """Of equal small weights, eight times the alpha adds eight times as much."""
    x, t, w = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500]), torch.ones(1)
    added = {}
    for alpha in (2.0, 16.0):
        task = distillation(random_family, students=partial(LoraStudents, lora=LoraSettings(rank=4, alpha=alpha)))
        generator, prompt = torch.Generator().manual_seed(0), task.conditioner(["a red circle"])
        for parameter in task.students.parameters_of("reverse"):
            parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=generator))
        teacher, student = (task.students.predict(role, x, t, prompt, w) for role in ("teacher", "reverse"))
        added[alpha] = student - teacher
    torch.testing.assert_close(added[16.0], 8 * added[2.0], rtol=0.05, atol=0.05 * float(added[16.0].abs().max()))


def test_sdxl_is_told_the_framing_in_pixels_of_the_picture(layouts, scenes, tmp_path):
    """Original size, place of the cut and target size: of pictures of 64 x 64 pixels, not of latents."""
    task = stage_one(Family(str(layouts["sdxl"])))
    student = Watched(task.student)
    fit(task, scenes, tmp_path)
    (call,) = student.calls
    assert call["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert call["added_cond_kwargs"]["text_embeds"].shape == (2, 24)
    assert call["x"].shape == (2, 4, 8, 8)


def test_training_draws_from_the_posterior_and_does_not_take_its_mean(layouts, scenes, tmp_path):
    task = InvertibleConsistencyDistillation(Family(str(layouts["sd15"])), FEW, guidance_scales=(1.0, 8.0))
    noised: list[Tensor] = []
    latents = task.latents
    task.latents = lambda batch, draws: noised.append((batch, latents(batch, draws))) or noised[-1][1]
    fit(task, scenes, tmp_path)
    ((batch, drawn),) = noised
    moments = task.autoencoder.moments(batch.images)
    mean, std = task.autoencoder.sample(moments), (0.5 * moments.chunk(2, 1)[1]).exp()
    deviations = (drawn - mean) / (std * task.autoencoder.scaling_factor)
    assert 0.8 < deviations.std() < 1.2
    expected = task.autoencoder.sample(moments, normal=Draws(0, 0).of("latents").normal)
    torch.testing.assert_close(drawn, expected)


def test_the_reverse_student_is_trained_at_every_guidance_scale_and_the_forward_student_unguided(
    random_family, scenes, tmp_path, monkeypatch
):
    task = distillation(random_family, students=FEW, guidance_scales=(1.0, 3.0, 5.0))
    asked: list[tuple[str, Tensor]] = []
    predict = UNet.predict

    def told(*args):
        asked.append((task.students.active, args[-1]))
        return predict(*args)

    monkeypatch.setattr(UNet, "predict", told)
    fit(task, scenes, tmp_path, max_steps=4, batch_size=6)
    scales = {role: set(torch.cat([w for r, w in asked if r == role]).tolist()) for role in ("forward", "reverse")}
    assert scales == {"forward": {1.0}, "reverse": {1.0, 3.0, 5.0}}
