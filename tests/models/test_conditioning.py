"""Conditioning is a batch like any other: cut, joined, repeated and chosen without mixing samples or names."""

import pytest
import torch

from icd_lightning.models.conditioning import Conditioning


@pytest.fixture
def conditioning():
    return Conditioning(prompt_embeds=torch.randn(3, 5, 16), anything=torch.arange(3))


def same(left, right):
    names = left.tensors.keys()
    return names == right.tensors.keys() and all(torch.equal(left.tensors[n], right.tensors[n]) for n in names)


def test_parts_joined_are_the_whole(conditioning):
    assert same(Conditioning.cat([conditioning[:2], conditioning[2]]), conditioning)
    assert same(Conditioning.cat([conditioning[i] for i in range(len(conditioning))]), conditioning)
    assert same(conditioning[-1], conditioning[torch.tensor([2])])
    assert [len(part) for part in (conditioning, conditioning[0], conditioning[:2])] == [3, 1, 2]
    with pytest.raises(IndexError):
        conditioning[3]


def test_repeat_goes_through_the_batch_again(conditioning):
    assert same(conditioning.repeat(2), conditioning[[0, 1, 2, 0, 1, 2]])


def test_samples_are_chosen_one_by_one(conditioning):
    other = conditioning.replace(anything=torch.arange(10, 13))
    chosen = conditioning.where(torch.tensor([True, False, True]), other)
    assert chosen.tensors["anything"].tolist() == [0, 11, 2]


def test_what_does_not_go_together_is_refused(conditioning):
    with pytest.raises(ValueError, match="3 of prompt_embeds, 2 of time_ids: give one of each for every sample"):
        Conditioning(prompt_embeds=torch.randn(3, 5, 16), time_ids=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="conditioning of nothing"):
        Conditioning()
    with pytest.raises(ValueError, match="anything is set in some of the conditionings"):
        Conditioning.cat([conditioning, Conditioning(prompt_embeds=torch.randn(3, 5, 16))])
