"""Seconds and bytes of one training step of stage 2: ours beside a step in the reference's style, in one process.

    python benchmarks/training_step.py                                               # the tiny network
    python benchmarks/training_step.py --family random:sd15 --latent 16 --batch 1 --rank 64
    python benchmarks/training_step.py --family random:sd15 --latent 64 --batch 8 --rank 64 --device cuda \
        --precision bfloat16 --peer ../invertible-cd
    python benchmarks/training_step.py --sweep batch=4,8,16,32 --plot step_time.png

Steps alternate, so that both meet the same weather; medians of `--repeats`. Memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import icd_lightning  # noqa: F401  first: it mends torchvision beside a CPU build of torch

import torch  # isort: skip
from steps import Ours, Peer, ReferenceStyle, Setting  # isort: skip
from torch.utils.flop_counter import FlopCounterMode

PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense matrix FLOP/s, from the vendor's data sheets
OURS = "ours"


def main() -> None:
    args = parse()
    setting = Setting(args.family, args.batch, args.latent, args.rank, args.device, args.precision)
    if args.memory_of:
        sys.stdout.write(f"{peak_memory(build(args.memory_of, setting, args.peer), setting)}\n")
        return
    if args.sweep:
        sweep(setting, args)
        return
    forms = [OURS, "reference-style", *(["reference"] if args.peer else [])]
    steps = {name: build(name, setting, args.peer) for name in forms}
    seconds = alternate(steps, setting, args.repeats)
    report(setting, steps, seconds, {name: measure_memory(name) for name in forms})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="tiny", help="tiny, random:sd15, random:sdxl, or a model's folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--latent", type=int, default=8, help="side of the latents")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA of each student")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peer", type=Path, help="a checkout of the reference's code, to run its own step functions")
    parser.add_argument("--sweep", help="time ours as one thing grows, as in batch=4,8,16 or latent=8,16 or rank=4,64")
    parser.add_argument("--plot", type=Path, help="where to draw the sweep")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str, setting: Setting, peer: Path | None) -> Callable[[int], None]:
    """The step of this name, on random or shipped weights."""
    if name == "reference":
        return Peer(setting, peer)
    return Ours(setting) if name == OURS else ReferenceStyle(setting)


def alternate(steps: dict[str, Callable[[int], None]], setting: Setting, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turns, after one of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, step in steps.items():
            start = now(setting)
            step(number)
            seconds[name].append(now(setting) - start)
    return {name: values[1:] for name, values in seconds.items()}


def now(setting: Setting) -> float:
    if setting.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def share_outside(step: Callable[[int], None], setting: Setting) -> float:
    """Share of a step's time that is spent neither in a UNet's forward pass nor in the backward pass."""
    inside, started = 0.0, 0.0

    def begin(*_: object) -> None:
        nonlocal started
        started = now(setting)

    def end(*_: object) -> None:
        nonlocal inside
        inside += now(setting) - started

    handles = []
    for unet in step.networks():
        handles += [unet.register_forward_pre_hook(begin), unet.register_forward_hook(end)]
    backward = torch.Tensor.backward

    def timed(self: torch.Tensor, *args: object, **kwargs: object) -> None:
        begin()
        backward(self, *args, **kwargs)
        end()

    torch.Tensor.backward = timed
    try:
        start = now(setting)
        step(0)
        return 1 - inside / (now(setting) - start)
    finally:
        torch.Tensor.backward = backward
        for handle in handles:
            handle.remove()


def bytes_of(modules: list[torch.nn.Module]) -> int:
    """Bytes of all weights, each counted once."""
    tensors = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def peak_memory(step: Callable[[int], None], setting: Setting) -> int:
    """Bytes at the peak of three steps: of the GPU, or of this process."""
    for number in range(3):
        step(number)
    if setting.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(name: str) -> int:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {name} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def report(setting: Setting, steps: dict, seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print the table; every ratio is of the reference-style step to ours, of this very run."""
    ours, gib = statistics.median(seconds[OURS]), 2**30
    cpu = setting.device == "cpu"
    where = f"{torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name()
    print(f"{json.dumps(asdict(setting))}, torch {torch.__version__}, {where}")
    columns = ["step", "median (s)", "min - max (s)", "time / ours", "UNets (GiB)", "UNets / ours"]
    columns += ["all weights (GiB)", "peak (GiB)", "outside UNets"]
    print(f"| {' | '.join(columns)} |\n| --- |{' --: |' * (len(columns) - 1)}")
    own = bytes_of(steps[OURS].networks())
    for name, step in steps.items():
        values, unets = seconds[name], bytes_of(step.networks())
        print(
            f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} - {max(values):.3f} "
            f"| {statistics.median(values) / ours:.2f} | {unets / gib:.3f} | {unets / own:.2f} "
            f"| {bytes_of(step.modules()) / gib:.3f} | {memory[name] / gib:.2f} | {share_outside(step, setting):.1%} |"
        )
    if setting.device != "cpu":
        counter = FlopCounterMode(display=False)
        with counter:
            steps[OURS](0)
        rate = counter.get_total_flops() / ours
        peak = next((peak for name, peak in PEAK_BF16.items() if name in torch.cuda.get_device_name()), None)
        share = f", {rate / peak:.0%} of the chip's bf16 rate" if peak else ""
        print(f"ours: {counter.get_total_flops() / 1e12:.2f} TFLOP a step, {rate / 1e12:.0f} TFLOP/s{share}")


def sweep(setting: Setting, args: argparse.Namespace) -> None:
    """Print, and draw if asked to, the time of our step and of the reference-style one as one thing grows."""
    name, _, values = args.sweep.partition("=")
    if not all(value.isdecimal() for value in values.split(",")):
        raise ValueError(f"--sweep {args.sweep} is not as in batch=4,8,16")
    points = [int(value) for value in values.split(",")]
    if name not in ("batch", "latent", "rank"):
        raise SystemExit(f"--sweep {args.sweep}: what grows must be batch, latent or rank")
    rows = []
    print(f"| {name} | ours (s) | reference-style (s) | ratio |\n| --: | --: | --: | --: |")
    for point in points:
        grown = replace(setting, **{name: point})
        steps = {form: build(form, grown, None) for form in (OURS, "reference-style")}
        medians = [statistics.median(values) for values in alternate(steps, grown, args.repeats).values()]
        rows.append(medians)
        print(f"| {point} | {medians[0]:.3f} | {medians[1]:.3f} | {medians[1] / medians[0]:.2f} |", flush=True)
    if args.plot:
        from matplotlib.figure import Figure

        axes = (figure := Figure(figsize=(5, 3.5), layout="constrained")).add_subplot()
        for label, column in zip((OURS, "reference-style"), zip(*rows, strict=True), strict=True):
            axes.plot(points, column, marker="o", label=label)
        axes.set(xlabel=name, ylabel="seconds a step", ylim=(0, None))
        axes.legend()
        figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as mistake:
        sys.stderr.write(f"training_step: error: {mistake}\n")
        raise SystemExit(2) from None
