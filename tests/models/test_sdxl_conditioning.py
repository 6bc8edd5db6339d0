"""What SDXL is told, as diffusers' own pipeline tells it: two encoders' embeddings, and where a picture was cut out."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from icd_lightning.models.conditioning import Framing
from icd_lightning.models.family import Family
from icd_lightning.models.text import CLIPConditioner, DualCLIPConditioner

PROMPTS = ["a small red ring", "a star"]
METADATA = [
    {"original_size": (1023, 768), "crop_top_left": (12, 0), "caption": "one"},
    {"original_size": [640, 641], "crop_top_left": [0, 34]},
]


@pytest.fixture(scope="module")
def family(layouts) -> Family:
    return Family(str(layouts["sdxl"]))


@pytest.fixture(scope="module")
def conditioner(family) -> DualCLIPConditioner:
    return family.load_conditioner()


@pytest.fixture(scope="module")
def pipe(family, conditioner) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=family.load_autoencoder().vae,
        unet=family.load_model(guided=False).network,
        scheduler=EulerDiscreteScheduler(),
        tokenizer=conditioner.first.tokenizer,
        tokenizer_2=conditioner.second.tokenizer,
        text_encoder=conditioner.first.text_encoder,
        text_encoder_2=conditioner.second.text_encoder,
    )


@torch.no_grad()
def test_embeddings_and_their_absence_are_those_of_diffusers(conditioner, pipe):
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    found, nothing = conditioner(PROMPTS), conditioner.unconditional(2)
    assert found.tensors["prompt_embeds"].shape == (2, 77, 16 + 24)
    assert torch.equal(found.tensors["prompt_embeds"], embeds)
    assert torch.equal(found.tensors["pooled_prompt_embeds"], pooled)
    assert torch.equal(nothing.tensors["prompt_embeds"], negative)
    assert torch.equal(nothing.tensors["pooled_prompt_embeds"], negative_pooled)
    assert negative.abs().max() == 0


@torch.no_grad()
def test_an_empty_caption_is_no_prompt(conditioner):
    found = conditioner(["", "a star"])
    nothing = conditioner.unconditional(1)
    assert torch.equal(found.tensors["prompt_embeds"][0], nothing.tensors["prompt_embeds"][0])
    assert torch.equal(found.tensors["pooled_prompt_embeds"][0], nothing.tensors["pooled_prompt_embeds"][0])
    assert torch.equal(found.tensors["prompt_embeds"][1], conditioner(["a star"]).tensors["prompt_embeds"][0])


@torch.no_grad()
def test_each_samples_framing_travels_with_it(conditioner, pipe):
    framing = Framing.of_latents(METADATA, torch.zeros(2, 4, 8, 6), 8)
    expected = [
        pipe._get_add_time_ids(
            *(tuple(sample[n]) for n in ("original_size", "crop_top_left")), (64, 48), torch.float32, 24
        )
        for sample in METADATA
    ]
    for conditioning in (conditioner(PROMPTS, framing), conditioner.unconditional(2, framing)):
        assert torch.equal(conditioning.tensors["time_ids"], torch.cat(expected))


@torch.no_grad()
def test_a_picture_of_unknown_framing_is_whole_and_of_the_models_own_size(conditioner):
    assert conditioner(PROMPTS).tensors["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert torch.equal(conditioner(PROMPTS).tensors["time_ids"], conditioner.unconditional(2).tensors["time_ids"])


def test_sizes_that_the_data_does_not_tell_are_refused_by_who_needs_them(conditioner):
    framing = Framing([{"crop_top_left": (0, 0)}], (64, 64))
    with pytest.raises(ValueError, match="lacks 'original_size', which SDXL is conditioned on"):
        conditioner(["a star"], framing)
    alone = CLIPConditioner(conditioner.first.tokenizer, conditioner.first.text_encoder)
    assert "time_ids" not in alone(["a star"], framing).tensors


def test_a_prompt_that_both_encoders_cut_is_reported_once(family, caplog):
    conditioner = family.load_conditioner()
    conditioner(["red " * 40])
    assert sum("cut:" in record.getMessage() for record in caplog.records) == 1


@torch.no_grad()
def test_the_network_is_told_all_as_diffusers_tells_it(family, conditioner):
    model, x, t, outputs = family.load_model(guided=False), torch.randn(2, 4, 8, 8), torch.full((2,), 500), []
    whole, cut = (
        conditioner(PROMPTS, Framing([{"original_size": (96, 64), "crop_top_left": crop}] * 2, (64, 64)))
        for crop in ((0, 0), (32, 0))
    )
    other = whole.replace(pooled_prompt_embeds=whole.tensors["pooled_prompt_embeds"].flip(0))
    for told in (whole, cut, other):
        embeds, pooled, ids = (told.tensors[key] for key in ("prompt_embeds", "pooled_prompt_embeds", "time_ids"))
        outputs.append(model.predict(x, t, told, None))
        added = {"text_embeds": pooled, "time_ids": ids}
        assert torch.equal(outputs[-1], model.network(x, t, embeds, added_cond_kwargs=added).sample)
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
