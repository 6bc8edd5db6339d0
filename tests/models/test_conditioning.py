"""Conditioning is a batch like any other: cut, joined, repeated and moved without mixing samples."""

import pytest
import torch

from icd_lightning.models.conditioning import Conditioning


@pytest.fixture(params=["sd15", "sdxl"])
def conditioning(request):
    prompt_embeds = torch.randn(3, 5, 16)
    if request.param == "sd15":
        return Conditioning(prompt_embeds)
    return Conditioning(prompt_embeds, torch.randn(3, 8), torch.tensor([[1023.0, 768, 0, 0, 512, 512]] * 3))


def fields(conditioning):
    return [conditioning.prompt_embeds, conditioning.pooled_prompt_embeds, conditioning.time_ids]


def same(left, right):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(fields(left), fields(right), strict=True))


def test_parts_joined_are_the_whole(conditioning):
    assert same(Conditioning.cat([conditioning[:2], conditioning[2]]), conditioning)
    assert same(Conditioning.cat([conditioning[i] for i in range(len(conditioning))]), conditioning)
    assert same(conditioning[-1], conditioning[torch.tensor([2])])
    assert [len(part) for part in (conditioning, conditioning[0], conditioning[:2])] == [3, 1, 2]
    with pytest.raises(IndexError):
        conditioning[3]


def test_repeat_goes_through_the_batch_again(conditioning):
    assert same(conditioning.repeat(2), conditioning[[0, 1, 2, 0, 1, 2]])


def test_casting_spares_the_time_ids(conditioning):
    half = conditioning.to("cpu", dtype=torch.bfloat16)
    assert half.prompt_embeds.dtype == torch.bfloat16
    if conditioning.time_ids is not None:
        assert half.pooled_prompt_embeds.dtype == torch.bfloat16
        assert torch.equal(half.time_ids, conditioning.time_ids)


def test_the_network_gets_what_is_set(conditioning):
    kwargs = conditioning.unet_kwargs()
    assert kwargs["encoder_hidden_states"] is conditioning.prompt_embeds
    if conditioning.time_ids is None:
        assert "added_cond_kwargs" not in kwargs
    else:
        assert kwargs["added_cond_kwargs"]["text_embeds"] is conditioning.pooled_prompt_embeds
        assert kwargs["added_cond_kwargs"]["time_ids"] is conditioning.time_ids


def test_halves_of_a_conditioning_are_refused(conditioning):
    embeds = torch.randn(3, 5, 16)
    with pytest.raises(ValueError, match="go together"):
        Conditioning(embeds, pooled_prompt_embeds=torch.randn(3, 8))
    with pytest.raises(ValueError, match="time_ids holds 2 samples, prompt_embeds 3"):
        Conditioning(embeds, torch.randn(3, 8), torch.zeros(2, 6))
    if conditioning.time_ids is not None:
        with pytest.raises(ValueError, match="in some of the conditionings"):
            Conditioning.cat([conditioning, Conditioning(embeds)])
