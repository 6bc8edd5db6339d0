"""Seconds, network evaluations and memory of one edit by every method, on the same weights, in one process.

    python benchmarks/editing.py                                                     # the tiny network
    python benchmarks/editing.py --peer ../invertible-cd --methods icd,nti --repeats 20
    python benchmarks/editing.py --family random:sd15 --latent 16 --methods icd_swap --peer ../invertible-cd

Methods alternate, so that all meet the same weather; slow ones, of more than 100 evaluations, are repeated less often.
Evaluations are of one picture: each row of a batch counts. With one thread (OMP_NUM_THREADS=1) ranges and ratios are of
processor seconds, which other jobs on the machine disturb less. Memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import icd_lightning  # noqa: F401  first: it mends torchvision beside a CPU build of torch

import torch  # isort: skip
from edits import BASE, REFERENCE, SLOW_NFE, Edit, Edited, ReferenceEdit, Setting  # isort: skip
from measuring import bytes_of, in_turns, measure_memory, peak_memory, run, table, threads_or_gpu  # isort: skip
from icd_lightning.editing.methods import METHODS

NULL_TEXT = "nti"
BARS = {REFERENCE: 1.9, NULL_TEXT: 10.0}
"""How many times faster than these iCD with Prompt-to-Prompt shall be."""
MIB = 2**20

Form = Edit | ReferenceEdit


def main() -> None:
    args = parse()
    setting = Setting(args.family, args.latent, args.device, args.precision)
    if args.memory_of:
        form = build(args.memory_of, setting, args.peer)
        form(0)
        sys.stdout.write(f"{peak_memory(setting.device)}\n")
        return
    forms, left_out = build_all(chosen(args.methods), setting, args.peer)
    repeats = {name: args.slow_repeats if form(0).nfe > SLOW_NFE else args.repeats for name, form in forms.items()}
    results, weights = in_turns(forms, repeats), {name: bytes_of(form.modules()) for name, form in forms.items()}
    forms.clear()  # others need the memory now
    report(setting, results, weights, {name: measure_memory(name) for name in results}, left_out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="tiny", help="tiny, random:sd15, or a model's folder")
    parser.add_argument("--latent", type=int, help="side of the latents; by default as the family was trained")
    parser.add_argument("--methods", default="all", help=f"all, or some of: {', '.join(METHODS.entries)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--slow-repeats", type=int, default=3, help="of methods of more than 100 evaluations")
    parser.add_argument("--peer", type=Path, help="a checkout of the reference's code, to edit by it")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.slow_repeats <= args.repeats:
        raise ValueError(f"--slow-repeats {args.slow_repeats} must be 1 or more, and at most --repeats {args.repeats}")
    return args


def chosen(methods: str) -> list[str]:
    """The names asked for, after iCD with Prompt-to-Prompt."""
    names = list(METHODS.entries) if methods == "all" else methods.split(",")
    for name in names:
        METHODS.find(name)
    return list(dict.fromkeys([BASE, *names]))


def build(name: str, setting: Setting, peer: Path | None) -> Form:
    """The form of this name, with its networks loaded."""
    return ReferenceEdit(setting, peer) if name == REFERENCE else Edit(name, setting)


def build_all(names: Sequence[str], setting: Setting, peer: Path | None) -> tuple[dict[str, Form], dict[str, str]]:
    """All forms, and why some of the methods cannot be had of this family."""
    forms: dict[str, Form] = {BASE: build(BASE, setting, peer)}
    if peer is not None:
        forms[REFERENCE] = build(REFERENCE, setting, peer)
    left_out = {}
    for name in names[1:]:
        try:
            forms[name] = build(name, setting, peer)
        except ValueError as reason:
            left_out[name] = str(reason)
    return forms, left_out


def report(
    setting: Setting,
    results: Mapping[str, Sequence[Edited]],
    weights: Mapping[str, int],
    memory: Mapping[str, int],
    left_out: Mapping[str, str],
) -> None:
    """Print the table, what is not in it, and whether the bars are reached; all ratios are of this very run."""
    print(f"{json.dumps(asdict(setting))}, torch {torch.__version__}, {threads_or_gpu(setting.device)}")
    kind = "cpu_seconds" if setting.device == "cpu" and torch.get_num_threads() == 1 else "seconds"
    taken = {name: [getattr(one, kind) for one in found] for name, found in results.items()}
    times = {name: statistics.median(values) for name, values in taken.items()}
    columns = ["method", "evaluations", "edits", "median (s)", "processor (s)", "min - max (s)", f"ratio to {BASE}"]
    rows = []
    for name, found in results.items():
        rows.append(
            [
                name,
                f"{statistics.median(one.nfe for one in found):g}",
                f"{len(found)}",
                f"{statistics.median(one.seconds for one in found):.3f}",
                f"{statistics.median(one.cpu_seconds for one in found):.3f}",
                f"{min(taken[name]):.3f} - {max(taken[name]):.3f}",
                f"{times[name] / times[BASE]:.2f}",
                f"{weights[name] / MIB:.0f}",
                f"{memory[name] / MIB:.0f}",
            ]
        )
    print(table([*columns, "weights (MiB)", "peak (MiB)"], rows))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    for name, bar in BARS.items():
        if name in times:
            print(f"{BASE} is {times[name] / times[BASE]:.2f} x as fast as {name} (to be reached: {bar:g} x)")
    if REFERENCE in results:
        print(f"peak memory of {BASE}: {memory[BASE] / memory[REFERENCE]:.2f} of the reference's (to be reached: 0.8)")
        pairs = zip(results[BASE], results[REFERENCE], strict=True)
        largest = max(float((ours.images - its.images).abs().max()) for ours, its in pairs)
        print(f"the reference's edited pictures differ from ours by {largest * 127.5:.1f} of 255 at most")


if __name__ == "__main__":
    run(main)
