"""Two real processes that share pictures measure what one process measures on all."""

import pytest
import torch
import torch.distributed as dist
from metrics_case import noisy, scenes
from ranks_case import run_ranks

from icd_lightning.metrics.registry import build_metrics

NAMES = ("psnr", "ssim", "mse-unedited", "latent-nll", "tiny-perceptual", "tiny-agreement", "tiny-fd")
COUNT, FIRST = 5, 3
"""Of five pictures the first process takes three; of its own two, the second has one mask that leaves nothing."""


def measure(part: slice) -> dict[str, float]:
    found, images = scenes(COUNT)
    results = (images + 0.2 * noisy(COUNT, size=(64, 64))[0]).clamp(-1, 1)
    masks = torch.zeros(COUNT, 1, 64, 64)
    masks[..., :16] = 1
    masks[-1] = 1
    prompts = [scene.caption() for scene in found]
    noise = torch.randn(COUNT, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    metrics = build_metrics(NAMES)
    for metric in metrics.values():
        metric.update(results[part], images[part], prompts=prompts[part], masks=masks[part], noise=noise[part])
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    torch.save(measure(slice(0, FIRST) if rank == 0 else slice(FIRST, COUNT)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    assert run_ranks(worker, str(tmp_path)) == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    assert first == pytest.approx(measure(slice(0, COUNT)), rel=1e-4)
