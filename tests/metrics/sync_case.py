"""One of two gloo processes that share pictures unevenly: sync_case.py RANK PORT FILE."""

import sys

import torch
import torch.distributed as dist
from metrics_case import noisy, scenes

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


if __name__ == "__main__":
    rank, port, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(measure(slice(0, FIRST) if rank == 0 else slice(FIRST, COUNT)), f"{file}{rank}")
    dist.destroy_process_group()
