"""Every figure that takes a GPU, the most important first, within `--minutes`: random weights, nothing downloaded.

    python benchmarks/gpu.py --peer ../invertible-cd
    python benchmarks/gpu.py --narrow --device cpu --minutes 1      # the tiny network for all: a trial of this script

Each figure is written to `--out` as soon as it is there, as JSON and as a table; what no longer fits into the time, or
into memory, is a line that says so. Steps are those of `steps.py`, edits those of `edits.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import icd_lightning  # noqa: F401  first: it mends torchvision beside a CPU build of torch

import torch  # isort: skip
import edits  # isort: skip
from measuring import now, peak_memory, run, table, timed  # isort: skip
from steps import Ours, Peer, ReferenceStyle, Setting, reference_code  # isort: skip
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from icd_lightning.files import write_json
from icd_lightning.models.diffusion_model import compile_networks

COLUMNS = {
    "seconds": "{:.4f}",
    "tflop": "{:.2f}",
    "tflop_s": "{:.0f}",
    "share": "{:.0%}",
    "peak_gib": "{:.2f}",
    "ratio": "{:.2f}",
}
"""What is known of a figure, and how it is printed: ratio is to our own step of the same batch, neither compiled nor
checkpointed; share is of the card's measured bf16 rate."""

Figure = dict[str, float | str]
Part = tuple[str, float, Callable[[], Figure]]
"""A figure's name, the seconds that it takes on a card of 80 GB or more (a guess), and how to get it."""


def main() -> None:
    args = parse()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch finds no GPU; --device cpu --narrow tries this script")
    if args.peer:
        reference_code(args.peer)
    card = Card(args)
    for name, guess, measure in parts(card):
        card.add(name, guess, measure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin nothing that is not thought to fit into these"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder for figures.json and table.md")
    parser.add_argument("--narrow", action="store_true", help="the tiny network in the place of SD1.5 and SDXL")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", type=Path, help="a checkout of the reference's code, to run its own step functions")
    args = parser.parse_args()
    if not 0 < args.minutes < float("inf") or args.repeats < 1:
        raise ValueError(f"--minutes {args.minutes} and --repeats {args.repeats} must be positive and finite")
    return args


class Card:
    """The figures so far, the time that is left, and the sizes to measure."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.figures, self.started = args, {}, time.monotonic()
        self.name = args.device if args.device == "cpu" else torch.cuda.get_device_name()

    def setting(self, batch: int, family: str = "random:sd15", latent: int = 64) -> Setting:
        """A step of true shape in bfloat16, or of the tiny network in float32."""
        if self.args.narrow:
            return Setting("tiny", 2, 8, 4, self.args.device)
        return Setting(family, batch, latent, 64, self.args.device, "bfloat16")

    def add(self, name: str, guess: float, measure: Callable[[], Figure]) -> None:
        """Measure and write one figure, or why there is none."""
        left = self.args.minutes * 60 - (time.monotonic() - self.started)
        if guess * (not self.args.narrow) > left:
            self.write(name, {"left out": f"{max(left, 0):.0f} s of --minutes {self.args.minutes:g} were left"})
            return
        if self.args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        try:
            figure = measure()
        except (RuntimeError, ValueError, OSError) as error:  # memory is full, or a compiler is missing
            figure = {"left out": " ".join(str(error).split())[:200]}
        self.write(name, figure)
        gc.collect()
        if self.args.device != "cpu":
            torch.cuda.empty_cache()

    def write(self, name: str, figure: Figure) -> None:
        """Both files, whole, with one figure more."""
        self.figures[name] = figure
        self.args.out.mkdir(parents=True, exist_ok=True)
        about = {"device": self.name, "torch": torch.__version__, "narrow": self.args.narrow}
        write_json(self.args.out / "figures.json", {**about, "figures": self.figures})
        rows = [[key, *cells(found)] for key, found in self.figures.items() if "left out" not in found]
        missing = [
            f"left out: {key}: {found['left out']}" for key, found in self.figures.items() if "left out" in found
        ]
        text = "\n".join([table(["", *COLUMNS], rows), "", *missing, ""])
        (self.args.out / "table.md").write_text(text)
        sys.stdout.write(f"{name}: {json.dumps(figure)}\n")
        sys.stdout.flush()


def cells(figure: Figure) -> list[str]:
    """A row of the table."""
    return [form.format(figure[key]) if key in figure else "" for key, form in COLUMNS.items()]


def parts(card: Card) -> Iterator[Part]:
    """What to measure, by its worth: who cuts the run short has the first."""
    eight, sixteen = card.setting(8), card.setting(16)
    yield "bf16 matrix product", 5, partial(matrix_rate, card)
    yield "SD1.5 step, batch 8", 30, partial(step, card, eight)
    yield "SD1.5 edit 4 + 4, P2P", 25, partial(edit, card, compiled=False)
    yield "SD1.5 step, batch 8, reference-style", 40, partial(step, card, eight, ReferenceStyle)
    if card.args.peer:
        yield "SD1.5 step, batch 8, reference", 40, partial(step, card, eight, partial(peer, card))
    yield "SD1.5 step, batch 8, compiled", 100, partial(step, card, replace(eight, compiled=True))
    yield "SD1.5 step, batch 16", 35, partial(step, card, sixteen)
    yield "SD1.5 edit 4 + 4, P2P, compiled", 60, partial(edit, card, compiled=True)
    yield "SD1.5 step, batch 8, checkpointing", 30, partial(step, card, replace(eight, checkpointing=True))
    yield "SD1.5 step, batch 16, checkpointing", 35, partial(step, card, replace(sixteen, checkpointing=True))
    yield "SDXL step at 1024 px, batch 2", 60, partial(step, card, card.setting(2, "random:sdxl", 128))
    yield "SD1.5 step, batch 16, compiled", 100, partial(step, card, replace(sixteen, compiled=True))
    yield "profile of a step, batch 8", 30, partial(profiled, card, eight)
    yield "FLUX step at 512 px, batch 1", 90, partial(step, card, card.setting(1, "random:flux_dev"))


def matrix_rate(card: Card) -> Figure:
    """What the card itself reaches: a product of square matrices."""
    side = 256 if card.args.narrow else 8192
    a = torch.randn(side, side, device=card.args.device, dtype=torch.bfloat16)
    seconds = median_seconds(lambda number: a @ a, card)
    return {"seconds": seconds, "tflop": 2 * side**3 / 1e12, "tflop_s": 2 * side**3 / 1e12 / seconds}


def step(card: Card, setting: Setting, form: Callable[[Setting], Callable] = Ours) -> Figure:
    """Seconds, counted work and memory of a training step; the ratio to ours where that was measured."""
    made = form(setting)
    seconds = median_seconds(made, card)
    figure = {"seconds": seconds, "peak_gib": peak_memory(setting.device) / 2**30}
    plain = card.figures.get(
        f"SD1.5 step, batch {setting.batch}" if not card.args.narrow else "SD1.5 step, batch 8", {}
    )
    if "seconds" in plain and setting.family == card.setting(8).family:
        figure["ratio"] = seconds / plain["seconds"]
    if not setting.compiled:  # compiled code hides its products from the counter
        with FlopCounterMode(display=False) as counter:
            made(0)
        figure["tflop"] = counter.get_total_flops() / 1e12
    elif "tflop" in plain:
        figure["tflop"] = plain["tflop"]
    if "tflop" in figure:
        figure["tflop_s"] = figure["tflop"] / seconds
        if rate := card.figures.get("bf16 matrix product", {}).get("tflop_s"):
            figure["share"] = figure["tflop_s"] / rate
    return figure


def peer(card: Card, setting: Setting) -> Peer:
    """The reference's own functions."""
    return Peer(ReferenceStyle(setting), card.args.peer)


def edit(card: Card, *, compiled: bool) -> Figure:
    """Seconds of one edit, of which prompts, encoding and decoding are part."""
    setting = card.setting(1)
    form = edits.Edit(edits.BASE, edits.Setting(setting.family, setting.latent, setting.device, setting.precision))
    if compiled:
        compile_networks([form.method.students.network], form.device)
    seconds = median_seconds(form, card)
    return {"seconds": seconds, "peak_gib": peak_memory(setting.device) / 2**30}


def profiled(card: Card, setting: Setting) -> Figure:
    """A step's kernels by the time they take, in profile.txt."""
    made, kind = Ours(setting), "cpu" if setting.device == "cpu" else "cuda"
    made(0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]
    with profile(activities=activities) as found:
        start = now(setting.device)
        made(1)
        seconds = now(setting.device) - start
    rows = found.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=40)
    (card.args.out / "profile.txt").write_text(rows)
    return {"seconds": seconds}


def median_seconds(form: Callable[[int], object], card: Card) -> float:
    """Of the repeats, after one call to warm up, which compiles too."""
    seconds = timed(form, card.args.device)
    seconds(0)
    return statistics.median(seconds(number) for number in range(card.args.repeats))


if __name__ == "__main__":
    run(main)
