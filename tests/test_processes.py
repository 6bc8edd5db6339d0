import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from icd_lightning.processes import in_processes


def _square(number):
    return number * number


def _killed(number):
    os.kill(os.getpid(), signal.SIGKILL)


def _large(number):
    return bytes(3_000_000)  # more than a pipe takes at once


def _fails_at_70(number):
    if number == 70:
        raise ValueError(f"there is no {number}")
    return number


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_nothing_is_drawn(count):
    before = torch.get_rng_state()
    assert list(in_processes(_square, range(210), count, chunksize=4)) == [number**2 for number in range(210)]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_comes_as_it_is_after_the_results_before_it():
    results = in_processes(_fails_at_70, range(210), 2, chunksize=64)
    assert [next(results) for _ in range(70)] == list(range(70))
    with pytest.raises(ValueError, match=r"^there is no 70$"):
        next(results)


def test_a_process_that_is_killed_ends_the_work_and_does_not_hang_it(monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # looks every 5 s else
    with pytest.raises(OSError, match="one of 2 processes was killed"):
        list(in_processes(_killed, range(210), 2))


def test_work_that_is_broken_off_half_sent_ends_at_once_and_leaves_no_process():
    start = time.monotonic()
    for _ in range(5):
        results = in_processes(_large, range(1000), 2)
        next(results)
        results.close()
    assert time.monotonic() - start < 20  # to wait for a worker that hangs takes 5 s each time
    assert multiprocessing.active_children() == []
