"""Attribute accuracy, counted by hand."""

import numpy as np
import pytest
import torch

from icd_lightning.tiny.scene_network import GROUPS, attribute_accuracy
from icd_lightning.tiny.scenes import ABSENT, LABELS, labels, scene_at

NAMES = list(LABELS)


def table(rows: int, **values: list[int]) -> torch.Tensor:
    """Labels (rows, len(LABELS)), all 0 but for the columns given; `shape_1` is the column "shape 1"."""
    found = torch.zeros(rows, len(NAMES), dtype=torch.long)
    for name, column in values.items():
        found[:, NAMES.index(name.replace("_", " "))] = torch.tensor(column)
    return found


def test_every_attribute_belongs_to_one_group():
    assert sorted(name for members in GROUPS.values() for name in members) == sorted(NAMES)


def test_the_share_of_right_ones_by_hand():
    truth = table(4, layout=[0, 1, 2, 1], shape_1=[0, 1, 2, 3], shape_2=[ABSENT, 4, 5, 0])
    found = table(4, layout=[0, 1, 1, 1], shape_1=[0, 1, 0, 0], shape_2=[0, 4, 0, 0])
    accuracy = attribute_accuracy(found, truth)
    assert accuracy.keys() == GROUPS.keys()
    assert accuracy["layout"] == pytest.approx(3 / 4)
    assert accuracy["object shape"] == pytest.approx(4 / 7)  # 2 of the 4 first objects, 2 of the 3 second ones
    assert all(accuracy[group] == 1 for group in GROUPS.keys() - {"layout", "object shape"})


@pytest.mark.parametrize("guess", [0, 3, ABSENT])
def test_what_is_absent_is_counted_neither_way(guess):
    truth = table(2, color_1=[1, 2], color_2=[ABSENT, ABSENT])
    found = table(2, color_1=[1, 0], color_2=[guess, guess])
    assert attribute_accuracy(found, truth)["object color"] == pytest.approx(1 / 2)


def test_the_truth_about_scenes_is_right_and_shuffled_it_is_not():
    truth = torch.from_numpy(np.stack([labels(scene_at(0, index)) for index in range(200)]))
    assert all(value == 1 for value in attribute_accuracy(truth, truth).values())
    by_chance = attribute_accuracy(truth.roll(1, 0), truth)
    for group, expected in {"background color": 1 / 8, "background texture": 1 / 4, "object shape": 1 / 6}.items():
        assert by_chance[group] == pytest.approx(expected, abs=0.12)
