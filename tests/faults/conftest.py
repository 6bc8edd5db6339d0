"""What the tests of faults measure is written to the file that ICD_RELIABILITY names: `make test-faults` does so."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

BEGIN, END = "<!-- figures, by make test-faults -->", "<!-- end of figures -->"
ROWS: list[tuple[str, str]] = []
HOSTILE = {
    "hostile_data": "bad samples, shards and manifests",
    "hostile_models": "damaged model folders and students",
    "hostile_configurations": "configurations and method files by somebody else",
}
TRIED: Counter[str] = Counter()


@pytest.fixture
def measured() -> Callable[[str, str], None]:
    """Keep a figure: what was tried, and what came of it."""
    return lambda tried, outcome: ROWS.append((tried, outcome))


@pytest.fixture
def impatient() -> Iterator[None]:
    """Let the test fail that waits for a minute, as for a pipe in which nothing comes."""

    def give_up(*_: object) -> NoReturn:
        pytest.fail("it is waited for")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the hostile inputs that were met as their tests say."""
    if report.when == "call" and report.passed:
        TRIED.update(kind for kind in HOSTILE if kind in report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Put the figures between their marks, if all went well."""
    name = os.environ.get("ICD_RELIABILITY")
    if not name or not ROWS or session.exitstatus:
        return
    file = Path(name)
    before, _, rest = file.read_text().partition(BEGIN)
    counted = [
        (HOSTILE[kind], f"{count} tried: skipped and counted, or refused in one line") for kind, count in TRIED.items()
    ]
    rows = "\n".join(f"| {tried} | {outcome} |" for tried, outcome in [*ROWS, *counted])
    file.write_text(f"{before}{BEGIN}\n| tried | outcome |\n| --- | --- |\n{rows}\n{END}{rest.partition(END)[2]}")
