"""Prompts become embeddings as the text encoder's own library makes them; what is cut is said."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from icd_lightning.models.text import MAX_REPORTS, CLIPConditioner, build_tokenizer
from icd_lightning.tiny.scenes import vocabulary

LENGTH, WIDTH = 24, 16
PROMPTS = ["a small red ring on a blue background", "a large greenish star", ""]


def build_conditioner(words: set[str], length: int = LENGTH) -> CLIPConditioner:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(words, 10 * length)  # the encoder's positions decide where a prompt is cut
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        **special,
    )
    return CLIPConditioner(tokenizer, CLIPTextModel(config).eval())


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
    ids = conditioner.tokenize(["red ring", ""])
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
        ids = conditioner.tokenize([fits, cut])
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
