"""Prompts become embeddings as the text encoder's own library makes them; what is cut is said."""

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from icd_lightning.models.text import (
    MAX_REPORTS,
    CLIPConditioner,
    T5Conditioner,
    TextSide,
    build_t5_tokenizer,
    build_tokenizer,
)
from icd_lightning.tiny.scenes import vocabulary

LENGTH, WIDTH = 24, 16
PROMPTS = ["a small red ring on a blue background", "a large greenish star", ""]


def build_conditioner(words: set[str], length: int = LENGTH) -> CLIPConditioner:
    return CLIPConditioner(*build_clip(CLIPTextModel, words, length))


def build_clip(cls: type, words: set[str], length: int = LENGTH) -> tuple:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(words, 10 * length)  # the encoder's positions decide where a prompt is cut
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        **special,
    )
    return tokenizer, cls(config).eval()


@pytest.fixture(scope="module")
def conditioner() -> CLIPConditioner:
    return build_conditioner(vocabulary())


def test_embeddings_are_the_encoders_last_hidden_states(conditioner):
    conditioning = conditioner(PROMPTS)
    ids = conditioner.tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    assert conditioning.tensors["prompt_embeds"].shape == (3, LENGTH, WIDTH)
    assert torch.equal(conditioning.tensors["prompt_embeds"], conditioner.text_encoder(ids).last_hidden_state)
    assert [*conditioning.tensors] == ["prompt_embeds"]


@torch.no_grad()
def test_a_prompt_does_not_depend_on_its_company(conditioner):
    together = conditioner(PROMPTS).tensors["prompt_embeds"]
    for index, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(conditioner([prompt]).tensors["prompt_embeds"][0], together[index])
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("words", [vocabulary(), {"red", "ring"}], ids=["world", "other"])
def test_special_tokens_are_those_of_the_tokenizer(words):
    """Another vocabulary has other ids, and none of them is a constant of the code."""
    conditioner = build_conditioner(words)
    tokenizer = conditioner.tokenizer
    ids = conditioner.tokenize(["red ring", ""]).input_ids
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert (start, end) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert ids[:, 0].tolist() == [start, start]
    assert ids[0, 3:].tolist() == [end] + [pad] * (LENGTH - 4)
    assert ids[1, 1:].tolist() == [end] + [pad] * (LENGTH - 2)


def reports(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("icd_lightning")]


def test_a_prompt_that_is_cut_is_logged_once_with_what_is_lost(caplog):
    conditioner = build_conditioner(vocabulary())
    words = ["red"] * 20 + ["star", "ring", "cross", "circle"]
    fits, cut = " ".join(words[:22]), " ".join(words)
    for _ in range(2):
        ids = conditioner.tokenize([fits, cut]).input_ids
        assert torch.equal(ids[0], ids[1])
        assert ids.shape == (2, LENGTH)
    assert reports(caplog) == [f"prompt {cut!r} is longer than {LENGTH} tokens; cut: 'cross circle'"]


def test_a_training_on_long_captions_does_not_fill_the_log(caplog):
    conditioner = build_conditioner(vocabulary())
    for count in range(30, 90):
        conditioner.tokenize(["red " * count])
    assert len(reports(caplog)) == MAX_REPORTS + 1
    assert reports(caplog)[-1] == "prompts cut from now on are not reported"


def test_unconditional_is_the_empty_prompt(conditioner):
    unconditional = conditioner.unconditional(4)
    assert len(unconditional) == 4
    assert torch.equal(unconditional.tensors["prompt_embeds"], conditioner([""] * 4).tensors["prompt_embeds"])
    assert not unconditional.tensors["prompt_embeds"].requires_grad


def test_gradients_reach_an_encoder_that_is_trained():
    conditioner = build_conditioner(vocabulary())
    conditioner(PROMPTS).tensors["prompt_embeds"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in conditioner.text_encoder.parameters())
    conditioner.text_encoder.requires_grad_(False)
    assert not conditioner(PROMPTS).tensors["prompt_embeds"].requires_grad


# --- CLIP and T5 ------------------------------------------------------------------------------------------------------


def build_t5(max_length: int) -> TextSide:
    torch.manual_seed(1)
    tokenizer = build_t5_tokenizer()
    sizes = {"d_model": 3 * WIDTH, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return TextSide(tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval(), max_length)


def encoders(number_of_clips: int, max_length: int = 40) -> T5Conditioner:
    cls = CLIPTextModel if number_of_clips == 1 else CLIPTextModelWithProjection
    clips = [TextSide(*build_clip(cls, {"red", "ring"}, LENGTH)) for _ in range(number_of_clips)]
    return T5Conditioner(clips, build_t5(max_length))


def encoded_by_diffusers(conditioner: T5Conditioner, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What FLUX's pipeline makes of prompts, or with two CLIPs SD3's."""
    sides = (*conditioner.clips, conditioner.t5)
    suffixes = ("", "_2", "_3")[: len(sides)]
    parts = {f"tokenizer{suffix}": side.tokenizer for suffix, side in zip(suffixes, sides, strict=True)}
    parts |= {f"text_encoder{suffix}": side.text_encoder for suffix, side in zip(suffixes, sides, strict=True)}
    options = {"max_sequence_length": conditioner.t5.max_length, "device": "cpu"}
    if len(sides) == 2:
        return FluxPipeline(None, None, transformer=None, **parts).encode_prompt(prompts, None, **options)[:2]
    pipeline = StableDiffusion3Pipeline(None, None, None, **parts)
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **options)
    return embeds, pooled


@torch.no_grad()
@pytest.mark.parametrize("number_of_clips", [1, 2], ids=["flux", "sd3"])
def test_clip_and_t5_are_joined_as_diffusers_pipelines_do(number_of_clips):
    conditioner = encoders(number_of_clips)
    prompts = ["a red ring", "ring " * 30, ""]
    embeds, pooled = encoded_by_diffusers(conditioner, prompts)
    tensors = conditioner(prompts).tensors
    assert torch.equal(tensors["prompt_embeds"], embeds)
    assert torch.equal(tensors["pooled_prompt_embeds"], pooled)
    assert tensors["prompt_embeds"].shape[1] == 40 + (LENGTH if number_of_clips == 2 else 0)
    empty = conditioner.unconditional(2).tensors
    torch.testing.assert_close(empty["prompt_embeds"], embeds[2:].repeat(2, 1, 1))
    torch.testing.assert_close(empty["pooled_prompt_embeds"], pooled[2:].repeat(2, 1))


def test_of_clip_and_t5_only_what_t5_loses_is_reported(caplog):
    conditioner = encoders(1)
    conditioner(["ring " * 7])
    assert reports(caplog) == []
    conditioner(["ring " * 10])
    assert len(reports(caplog)) == 1
    assert "is longer than 40 tokens" in reports(caplog)[0]
