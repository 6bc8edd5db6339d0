import math

import pytest

from icd_lightning.data import tally as module
from icd_lightning.data.tally import NothingToReadError, RejectedError, Tally


def read(tally: Tally, good: int, bad: int = 0, worker: int = 0, reason: str = "too_small") -> None:
    """Count as `worker` what `usable` would."""
    tally.worker = worker
    tally.add("read", good)
    tally.add("passed", good)
    for _ in range(bad):
        tally.add("read")
        tally.skipped(reason, f"a picture of worker {worker}")


def test_counts_go_by_reason_over_all_workers_and_each_reason_is_said_once(caplog):
    tally = Tally(num_workers=2)
    read(tally, 3, 2, worker=0)
    read(tally, 1, 1, worker=1)
    read(tally, 0, 1, worker=1, reason="no_caption")
    assert {name: n for name, n in tally.counts().items() if n} == {"passed": 4, "too_small": 3, "no_caption": 1}
    assert len(caplog.records) == 2
    assert "no_caption 1, too_small 3; for one, a picture of worker 0" in str(tally.nothing("x"))


def test_samples_that_are_rejected_are_left_out_and_counted():
    def decode(raw):
        if raw["n"] > 2:
            raise RejectedError("corrupt_image", "n > 2")
        return raw["n"]

    tally = Tally()
    assert list(tally.usable(decode, ({"n": n} for n in range(5)))) == [0, 1, 2]
    assert tally.counts()["corrupt_image"] == 2


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_run_ends_when_more_than_a_share_is_lost_and_not_before_a_thousand(share):
    most = int(share * module.MIN_READ)
    tally = Tally(num_workers=2, max_skipped=share)
    read(tally, 0, most, worker=0)
    read(tally, module.MIN_READ - most, worker=1)
    with pytest.raises(
        NothingToReadError, match=rf"{most + 1} of 1001 samples .* more than max_skipped {share:g} allows"
    ):
        read(tally, 0, 1)
    read(Tally(max_skipped=1), 0, 1500)


def test_a_broken_shard_counts_with_the_samples_it_would_have_held():
    tally = Tally(max_skipped=0.5)
    for _ in range(3):
        tally.add("shards")
        read(tally, 300)
    for name in "def":  # 300 each, as the others had
        tally.add("shards")
        tally.broke(f"{name}.tar")
    assert tally.counts()["broken_shard"] == 3
    tally.add("shards")
    with pytest.raises(NothingToReadError, match=r"1200 of 2100 samples"):
        tally.broke("g.tar")


def test_silence_ends_a_run_and_waiting_for_the_trainer_is_none(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tally = Tally(num_workers=2, stall_timeout=20)
    now[0] += 30
    tally.worker = 1
    tally.awaited()  # training or validation went on meanwhile; a batch is asked for only now
    read(tally, 0, 1, worker=1)
    now[0] += 15
    tally.awaited()
    now[0] += 15
    read(tally, 0, 1, worker=1)
    now[0] += 6
    with pytest.raises(NothingToReadError, match=r"no sample that can be used was found for 20 s .*too_small 3"):
        read(tally, 0, 1, worker=1)


@pytest.mark.parametrize(
    "limits", [{"max_skipped": -0.1}, {"max_skipped": 1.1}, {"stall_timeout": 0}, {"stall_timeout": math.nan}]
)
def test_limits_that_make_no_sense_are_refused(limits):
    (name,) = limits
    with pytest.raises(ValueError, match=f"{name} {limits[name]} must"):
        Tally(**limits)
