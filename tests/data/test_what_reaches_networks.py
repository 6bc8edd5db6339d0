"""What shards hold is what the networks of a real training are told."""

import icd_lightning  # noqa: F401 (before diffusers: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import lightning
import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from training_case import FEW, distillation, scenes_data, trainer_for

from icd_lightning.data.shards import encode_sample, write_shards

SIZES = [(64, 64), (80, 128), (160, 64), (200, 100)]
FRAMINGS = [(64, 64, 0, 0), (80, 128, 0, 19), (160, 64, 48, 0), (200, 100, 32, 0)]
"""Height and width of the picture; top and left of the cut, in pixels of the picture brought to 64."""

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


@pytest.fixture
def shards(tmp_path):
    """Pictures of four forms; the caption of each is its number."""
    pictures = [np.full((*size, 3), 40 * number, np.uint8) for number, size in enumerate(SIZES)]
    samples = [encode_sample(f"{n}", picture, f"number {n}", {}) for n, picture in enumerate(pictures)]
    write_shards(samples, tmp_path / "shards", shard_size=4, parameters={})
    return tmp_path / "shards"


class Heard(lightning.Callback):
    """For each micro-batch, its pictures' numbers, the prompts encoded and the framings that the UNet was given."""

    def __init__(self, task, monkeypatch) -> None:
        self.batches: list[tuple[list[int], set[str], set[tuple[float, ...]]]] = []
        forward = UNet2DConditionModel.forward

        def heard(unet, *args, added_cond_kwargs, **options):
            self.batches[-1][2].update(map(tuple, added_cond_kwargs["time_ids"][:, :4].int().tolist()))
            return forward(unet, *args, added_cond_kwargs=added_cond_kwargs, **options)

        monkeypatch.setattr(UNet2DConditionModel, "forward", heard)
        task.conditioner.register_forward_pre_hook(lambda _, args: self.batches[-1][1].update(args[0]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(([int(key) for key in batch.keys], set(), set()))


def test_captions_and_framing_of_each_sample_reach_the_network(shards, layouts, tmp_path, monkeypatch):
    task = distillation(layouts["sdxl"], students=FEW, caption_dropout=0.0)
    heard = Heard(task, monkeypatch)
    trainer_for(tmp_path, callbacks=[heard], max_epochs=2).fit(task, datamodule=scenes_data(shards))
    assert len(heard.batches) == 4
    for numbers, prompts, framings in heard.batches:
        assert prompts == {f"number {number}" for number in numbers}
        assert framings == {FRAMINGS[number] for number in numbers}
    for epoch in (heard.batches[:2], heard.batches[2:]):
        assert sorted(number for numbers, *_ in epoch for number in numbers) == [0, 1, 2, 3]
