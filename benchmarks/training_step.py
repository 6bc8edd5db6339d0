"""Seconds and bytes of one training step of stage 2: ours beside a step in the reference's style, in one process.

    python benchmarks/training_step.py                                               # the tiny network
    python benchmarks/training_step.py --family random:sd15 --latent 16 --batch 1 --rank 64
    python benchmarks/training_step.py --family random:sd15 --latent 64 --batch 8 --rank 64 --device cuda \
        --precision bfloat16 --peer ../invertible-cd
    python benchmarks/training_step.py --sweep batch=4,8,16,32 latent=4,8,16 rank=4,16,64 processes=1,2 \
        --plot step_time.png

Steps alternate, so that both meet the same weather; medians of `--repeats`. Memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import icd_lightning  # noqa: F401  first: it mends torchvision beside a CPU build of torch

import torch  # isort: skip
from measuring import (  # isort: skip
    bytes_of,
    in_turns,
    measure_memory,
    now,
    peak_memory,
    run,
    run_again,
    table,
    threads_or_gpu,
    timed,
)
from steps import Ours, Peer, ReferenceStyle, Setting, reference_code  # isort: skip
from torch.utils.flop_counter import FlopCounterMode

from icd_lightning.models.diffusion_model import why_not_compiled

PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense matrix FLOP/s, from the vendor's data sheets
OURS, COMPILED, STYLE, PEER = "ours", "ours, compiled", "reference-style", "reference"
GROWING = ("batch", "latent", "rank", "processes")


def main() -> None:
    args = parse()
    setting = Setting(args.family, args.batch, args.latent, args.rank, args.device, args.precision)
    if args.memory_of:
        step = build(args.memory_of, setting, args.peer)
        for number in range(3):
            step(number)
        sys.stdout.write(f"{peak_memory(setting.device)}\n")
        return
    if args.together:
        together(setting, args.repeats)
        return
    if args.sweep:
        sweep([read_sweep(text) for text in args.sweep], setting, args)
        return
    if args.peer:
        reference_code(args.peer)  # it may be missing: say so now
    # before this process has networks of its own
    compiled = [COMPILED] if args.compile else []
    memory = {name: measure_memory(name) for name in (OURS, *compiled, STYLE, *([PEER] if args.peer else []))}
    steps: dict[str, Callable[[int], None]] = {name: build(name, setting, None) for name in (OURS, *compiled)}
    steps[STYLE] = style = ReferenceStyle(setting)
    if args.peer:
        steps[PEER] = Peer(style, args.peer)
    report(setting, steps, alternate(steps, setting, args.repeats), memory)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="tiny", help="tiny, random:sd15, random:sdxl, or a model's folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--latent", type=int, default=8, help="side of the latents")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA of each student")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile, too; minutes for the first step")
    parser.add_argument("--peer", type=Path, help="a checkout of the reference's code, to run its own step functions")
    text = "time steps as one thing after another grows; of several processes each has a batch of its own"
    parser.add_argument("--sweep", nargs="+", metavar="batch=4,8", help=f"{text} ({', '.join(GROWING)})")
    parser.add_argument("--plot", type=Path, help="where to draw the sweep")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile and args.sweep:
        raise ValueError("--compile goes with one setting: leave out --sweep")
    return args


def build(name: str, setting: Setting, peer: Path | None) -> Callable[[int], None]:
    """The step of this name, on random or shipped weights."""
    if name == COMPILED and (reason := why_not_compiled(torch.device(setting.device), "inductor")):
        raise ValueError(f"--compile: torch.compile does not work here ({reason})")  # else it would run as it is
    if name in (OURS, COMPILED):
        return Ours(replace(setting, compiled=name == COMPILED))
    style = ReferenceStyle(setting)
    return Peer(style, peer) if name == PEER else style


def alternate(steps: dict[str, Callable[[int], None]], setting: Setting, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turns."""
    forms = {name: timed(step, setting.device) for name, step in steps.items()}
    return in_turns(forms, dict.fromkeys(forms, repeats))


def share_outside(step: Callable[[int], None], setting: Setting) -> float:
    """Share of a step's time that is spent neither in a UNet's forward pass nor in the backward pass."""
    inside, started = 0.0, 0.0

    def begin(*_: object) -> None:
        nonlocal started
        started = now(setting.device)

    def end(*_: object) -> None:
        nonlocal inside
        inside += now(setting.device) - started

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
        start = now(setting.device)
        step(0)
        return 1 - inside / (now(setting.device) - start)
    finally:
        torch.Tensor.backward = backward
        for handle in handles:
            handle.remove()


def report(setting: Setting, steps: dict, seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print the table; every ratio is of the reference-style step to ours, of this very run."""
    ours, gib = statistics.median(seconds[OURS]), 2**30
    print(f"{json.dumps(asdict(setting))}, torch {torch.__version__}, {threads_or_gpu(setting.device)}")
    columns = ["step", "median (s)", "min - max (s)", "time / ours", "UNets (GiB)", "UNets / ours"]
    columns += ["all weights (GiB)", "peak (GiB)", "outside UNets"]
    own, rows = bytes_of(steps[OURS].networks()), []
    for name, step in steps.items():
        values, unets = seconds[name], bytes_of(step.networks())
        rows.append(
            [
                name,
                f"{statistics.median(values):.3f}",
                f"{min(values):.3f} - {max(values):.3f}",
                f"{statistics.median(values) / ours:.2f}",
                f"{unets / gib:.3f}",
                f"{unets / own:.2f}",
                f"{bytes_of(step.modules()) / gib:.3f}",
                f"{memory[name] / gib:.2f}",
                "" if name == COMPILED else f"{share_outside(step, setting):.1%}",  # hooks would compile it anew
            ]
        )
    print(table(columns, rows))
    if setting.device != "cpu":
        counter = FlopCounterMode(display=False)
        with counter:
            steps[OURS](0)
        rate = counter.get_total_flops() / ours
        peak = next((peak for name, peak in PEAK_BF16.items() if name in torch.cuda.get_device_name()), None)
        share = f", {rate / peak:.0%} of the chip's bf16 rate" if peak else ""
        print(f"ours: {counter.get_total_flops() / 1e12:.2f} TFLOP a step, {rate / 1e12:.0f} TFLOP/s{share}")


def read_sweep(text: str) -> tuple[str, list[int]]:
    """Read "batch=4,8,16"."""
    name, _, values = text.partition("=")
    if name not in GROWING or not all(value.isdecimal() and int(value) for value in values.split(",")):
        raise ValueError(f"--sweep {text} is not as in batch=4,8,16; what grows is one of {', '.join(GROWING)}")
    return name, [int(value) for value in values.split(",")]


def sweep(sweeps: list[tuple[str, list[int]]], setting: Setting, args: argparse.Namespace) -> None:
    """Print the seconds of steps as one thing after another grows, and draw them if asked to."""
    curves = []
    for name, points in sweeps:
        forms = [OURS] if name == "processes" else [OURS, STYLE]
        print(table([name, *(f"{form} (s)" for form in forms), *(["ratio"] if STYLE in forms else [])], []))
        rows = []
        for point in points:
            if name == "processes":
                rows.append([in_processes(point, max(points))])
            else:
                grown = replace(setting, **{name: point})
                steps = {form: build(form, grown, None) for form in forms}
                rows.append([statistics.median(values) for values in alternate(steps, grown, args.repeats).values()])
            numbers = [f"{value:.3f}" for value in rows[-1]] + [f"{value / rows[-1][0]:.2f}" for value in rows[-1][1:]]
            print(f"| {point} | {' | '.join(numbers)} |", flush=True)
        print()
        curves.append((name, points, dict(zip(forms, zip(*rows, strict=True), strict=True))))
    if args.plot:
        draw(curves, args.plot)


def draw(curves: list[tuple[str, list[int], dict[str, tuple[float, ...]]]], path: Path) -> None:
    """One panel for each thing that grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 3), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (name, points, seconds) in zip(panels, curves, strict=True):
        for form, values in seconds.items():
            panel.plot(points, values, marker="o", label=form)
        highest = max(value for values in seconds.values() for value in values)
        panel.set(xlabel=name, ylim=(0, 1.08 * highest), xticks=points)
    panels[0].set_ylabel("seconds a step")
    panels[0].legend()
    figure.savefig(path, dpi=150)


def in_processes(count: int, most: int) -> float:
    """Median seconds of our step in so many processes, each with as many threads as `most` of them could have."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    threads = max(1, (os.cpu_count() or 1) // most)
    return float(run_again(["--together"], launcher, {"OMP_NUM_THREADS": str(threads)}))


def together(setting: Setting, repeats: int) -> None:
    """Be one of several processes; the first prints the median seconds."""
    torch.distributed.init_process_group("gloo" if setting.device == "cpu" else "nccl")
    if setting.device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    step = Ours(setting)
    step.distribute()
    seconds = alternate({OURS: step}, setting, repeats)[OURS]
    if torch.distributed.get_rank() == 0:
        sys.stdout.write(f"{statistics.median(seconds)}\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
