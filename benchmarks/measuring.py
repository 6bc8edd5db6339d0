"""What the benchmarks share: forms of one work that take turns, and the memory of each in a process of its own."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


def in_turns(forms: Mapping[str, Callable[[int], Result]], repeats: Mapping[str, int]) -> dict[str, list[Result]]:
    """What each form returns, called with the number of the round.

    All forms meet the same weather: they alternate, and those of fewer repeats have theirs spread over all rounds.
    Every form of the most repeats is called once before, to warm up.
    """
    results: dict[str, list[Result]] = {name: [] for name in forms}
    rounds = max(repeats.values())
    for name, form in forms.items():
        if repeats[name] == rounds:
            form(0)
    for number in range(rounds):
        for name, form in forms.items():
            if (number + 1) * repeats[name] // rounds > number * repeats[name] // rounds:
                results[name].append(form(number))
    return results


def timed(form: Callable[[int], object], device: str) -> Callable[[int], float]:
    """A form that returns its seconds."""

    def seconds(number: int) -> float:
        start = now(device)
        form(number)
        return now(device) - start

    return seconds


def now(device: str) -> float:
    """Seconds, with all work of a GPU done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def bytes_of(modules: Sequence[nn.Module]) -> int:
    """Bytes of all weights, each counted once."""
    tensors = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def peak_memory(device: str) -> int:
    """Bytes at the peak so far: of the GPU, or of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss begins with what the parent had when it started this process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(name: str) -> int:
    """Bytes at the peak of a form that has a process of its own."""
    return int(run_again(["--memory-of", name]))


def run_again(
    arguments: Sequence[str], launcher: Sequence[str] = (sys.executable,), environment: Mapping[str, str] = {}
) -> str:
    """The last word that this command prints when it is run again with these arguments too."""
    command, env = [*launcher, *sys.argv, *arguments], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout.split()[-1]


def run(main: Callable[[], None]) -> None:
    """Call main; a user's mistake is one line, exit code 2."""
    try:
        main()
    except (ValueError, OSError) as mistake:
        sys.stderr.write(f"{Path(sys.argv[0]).stem}: error: {mistake}\n")
        raise SystemExit(2) from None


def threads_or_gpu(device: str) -> str:
    """What does the work, in words."""
    return f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In markdown: names to the left, numbers to the right."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
