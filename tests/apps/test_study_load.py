"""200 assessors at once, and a server that is killed in the middle."""

import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import numpy as np
import pytest
from running_case import running
from study_case import Assessor, make_study, until

from icd_lightning.apps.study.store import Store

VOTERS, PAIRS, VOTES = 200, 100, 20


def is_up(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Voter:
    """Goes on until there is nothing left; `acknowledged` is what the server said it has, `seconds` what it took."""

    def __init__(self, port: int) -> None:
        self.port, self.path = port, None
        self.acknowledged, self.seconds, self.retries = {}, [], 0

    def insist(self, ask):
        """The answer, asked for again as long as there is none."""
        while True:
            try:
                assessor = Assessor(self.port, self.path)
                self.path = assessor.path
                return ask(assessor)
            except (OSError, HTTPException):
                self.retries += 1
                time.sleep(0.2)

    def work(self) -> None:
        while found := self.insist(Assessor.task):
            task, side = found[0], ("left", "right", "tie")[len(self.acknowledged) % 3]
            begun = time.perf_counter()
            assert self.insist(lambda assessor, task=task, side=side: assessor.vote(task, side)) == 303
            self.seconds.append(time.perf_counter() - begun)
            self.acknowledged[task] = side


@pytest.mark.slow
def test_no_acknowledged_vote_is_lost_and_none_counts_twice(tmp_path, capsys):
    study, voters = make_study(tmp_path, PAIRS, votes=VOTES, check_share=0.1), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "icd_lightning.commands.main", "study", "serve", str(study), "--port", str(port)]
    voters = [Voter(port) for _ in range(VOTERS)]

    def acknowledged() -> int:
        return sum(len(voter.acknowledged) for voter in voters)

    with ThreadPoolExecutor(VOTERS) as pool:
        with running(serve) as first:
            until(lambda: is_up(port), 60)
            begun = time.perf_counter()
            work = [pool.submit(voter.work) for voter in voters]
            until(lambda: acknowledged() > PAIRS * VOTES // 3, 200)
            first.kill()  # as kill -9 does
            first.wait()
        at_kill = acknowledged()
        with running(serve):
            for one in work:
                one.result(timeout=400)
            seconds = time.perf_counter() - begun
    store = Store(study)
    votes = store.votes()
    rows = {
        (token, task): (choice, swapped)
        for token, task, choice, swapped in store.read("SELECT assessor, task, choice, swapped FROM votes")
    }
    store.close()
    told = {(voter.path[3:], task): side for voter in voters for task, side in voter.acknowledged.items()}
    sides = {key: {"tie": "tie"}.get(c, ("left", "right")[(c == "b") != s]) for key, (c, s) in rows.items()}
    assert sides == told  # none lost, none changed, none that nobody gave
    assert len(votes) == len(told) == len(set(zip(votes.assessor, votes.task, strict=True)))
    assert set(Counter(votes.task[votes.b.notna()]).values()) == {VOTES}
    assert sum(voter.retries for voter in voters) > 0  # the kill was felt
    middle, most = 1e3 * np.percentile([s for voter in voters for s in voter.seconds], (50, 99))
    with capsys.disabled():
        print(
            f"\n{VOTERS} assessors, {len(told)} votes acknowledged ({at_kill} when the server was killed), 0 lost, "
            f"0 twice; {len(told) / seconds:.0f} votes/s with the restart, {middle:.0f} ms, 99 %: {most:.0f} ms"
        )
