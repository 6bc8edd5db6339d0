"""A prompt as the message of a chat: as diffusers' pipelines send it, and as edits look words up in it."""

import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from modern_case import qwen

from icd_lightning.editing.prompt_to_prompt.alignment import PromptTokens
from icd_lightning.models.chat import ChatConditioner
from icd_lightning.models.text import TextSide

LENGTH = 64
PROMPTS = ["a red star", " two  spaces, é", ""]


def conditioner(*layers: int, **options: bool) -> tuple[ChatConditioner, TextSide]:
    torch.manual_seed(0)
    model, tokenizer = qwen()
    side = TextSide(tokenizer, model, LENGTH)
    return ChatConditioner(side, layers, **options), side


@torch.no_grad()
def test_flux2s_prompts_are_encoded_as_by_diffusers_pipeline():
    ours, side = conditioner(9, 18, 27, thinking=False, padded=True)
    parts = side.text_encoder, side.tokenizer
    expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(*parts, PROMPTS, max_sequence_length=LENGTH)
    torch.testing.assert_close(ours(PROMPTS).tensors["prompt_embeds"], expected)


@torch.no_grad()
def test_z_images_prompts_are_encoded_as_by_diffusers_pipeline_with_zeros_behind():
    ours, side = conditioner(-2, thinking=True, padded=False)
    pipe = ZImagePipeline(None, None, side.text_encoder, side.tokenizer, None)
    expected = pipe._encode_prompt([*PROMPTS], torch.device("cpu"), max_sequence_length=LENGTH)
    for found, tokens in zip(ours(PROMPTS).tensors["prompt_embeds"], expected, strict=True):
        torch.testing.assert_close(found[: len(tokens)], tokens)
        assert not found[len(tokens) :].any()


def test_words_are_looked_up_in_the_prompt_and_not_in_the_template():
    ours, _ = conditioner(-2, thinking=True, padded=False)
    for prompt in ("a user star", "assistant"):
        read = PromptTokens.read(prompt, ours.tokenizer)
        letters = ["".join(ours.tokenizer.decode([read.ids[i]]) for i in places).strip() for places in read.places]
        assert letters == prompt.split()


def test_a_prompt_that_is_too_long_loses_its_own_end_and_is_reported(caplog):
    ours, _ = conditioner(-2, thinking=True, padded=False)
    end = ours.tokenizer("").input_ids[-ours.ends :]
    ids = ours.tokenize(["red " * 40]).input_ids[0].tolist()
    assert ids[-ours.ends :] == end
    kept = ours.tokenizer.decode(ids, skip_special_tokens=True).count("red")
    assert "is longer than 64 tokens" in caplog.text
    assert abs(caplog.text.partition("cut: ")[2].count("red") + kept - 40) <= 1  # one may be cut within


def test_a_template_without_place_for_a_prompt_is_refused():
    _, side = conditioner(-2, thinking=True, padded=False)
    for template in ("hello", None):
        side.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="the chat template of the tokenizer cannot be loaded"):
            ChatConditioner(side, (-2,), thinking=True, padded=False)


def test_prompts_that_the_template_leaves_no_room_for_are_refused():
    fits, side = conditioner(-2, thinking=True, padded=False)
    around = len(fits.tokenizer("").input_ids)
    for length in (-3, around):
        side.max_length = length
        with pytest.raises(ValueError, match=f"prompts of {length} tokens have no room .* beside {around} that"):
            ChatConditioner(side, (-2,), thinking=True, padded=False)
    side.max_length = around + 1
    assert ChatConditioner(side, (-2,), thinking=True, padded=False).tokenize(["a"]).input_ids.shape == (1, around + 1)
