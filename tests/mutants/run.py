"""`make mutants`: put one fault at a time into a copy of the package, and see whether the tests named for it fail.

faults.yaml lists them: a file of the package, a piece of its text that occurs once, what stands there instead, and the
tests that must fail. A fault that no test sees is a hole in the tests; the share that was caught is printed, with the
holes by name. A piece of text that is not found, or found twice, is an error: the list must follow the code.

    python tests/mutants/run.py                     all of them, on two cores about 20 minutes
    python tests/mutants/run.py --only draws        those whose name holds a word
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
COPIED = ("icd_lightning", "tests", "conf", "pyproject.toml", "README.md", "docs", "Makefile")


@dataclass(frozen=True)
class Fault:
    """One line of `file`, below icd_lightning/, changed from `old` to `new`; `tests` are what pytest is given."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def apply(self, root: Path) -> None:
        """Change the file; ValueError if the text to change is not there exactly once."""
        path = root / "icd_lightning" / self.file
        text = path.read_text()
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {self.old!r} {times} times, not once: mend the list")
        path.write_text(text.replace(self.old, self.new))


def read_faults(file: Path) -> list[Fault]:
    """The list, checked against the code as it is."""
    faults = [Fault(name, **fields) for name, fields in yaml.safe_load(file.read_text()).items()]
    with tempfile.TemporaryDirectory() as folder:
        for fault in faults:
            (Path(folder) / "icd_lightning" / fault.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "icd_lightning" / fault.file, Path(folder) / "icd_lightning" / fault.file)
            fault.apply(Path(folder))
    return faults


def is_caught(fault: Fault, folder: Path) -> bool:
    """Whether the fault's tests fail in a copy that has it."""
    copy = Path(tempfile.mkdtemp(dir=folder))
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "weights")
        shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy / name)
    (copy / "icd_lightning" / "weights").symlink_to(ROOT / "icd_lightning" / "weights")
    fault.apply(copy)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, *fault.tests.split()], cwd=copy, env=environment, capture_output=True, text=True)
    shutil.rmtree(copy)
    if done.returncode not in (0, 1):  # no test was run: a wrong name, or an import that the fault broke
        raise ValueError(f"{fault.name}: pytest {fault.tests} ended with {done.returncode}\n{done.stdout[-1500:]}")
    return done.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults tried at a time")
    options = parser.parse_args()
    faults = [fault for fault in read_faults(Path(__file__).with_name("faults.yaml")) if options.only in fault.name]
    start, missed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        for fault, caught in zip(faults, pool.map(lambda f: is_caught(f, Path(folder)), faults), strict=True):
            print(f"{'caught' if caught else 'MISSED'}  {fault.name}  ({fault.file})", flush=True)
            missed += [] if caught else [fault.name]
    caught, minutes = len(faults) - len(missed), (time.monotonic() - start) / 60
    print(f"{caught} of {len(faults)} faults caught ({100 * caught / len(faults):.0f} %), {minutes:.1f} minutes")
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
