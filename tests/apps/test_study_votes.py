"""Who is given what, and what becomes of a vote, in the study's file."""

import sqlite3
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from study_case import COLORS, make_study, method_in

from icd_lightning.apps.study import store as store_module
from icd_lightning.apps.study.store import Store


@pytest.fixture
def opened(tmp_path):
    """Opens a study made with these settings."""
    stores = []

    def open_study(*args, **plan):
        stores.append(Store(make_study(tmp_path, *args, **plan)))
        return stores[-1]

    yield open_study
    for store in stores:
        store.close()


def answer(store, token, side="left"):
    """Vote on the next task, if there is one; return what was shown."""
    shown = store.next_task(token)
    assert shown is None or store.vote(token, shown.task, side) == side
    return shown


def test_votes_are_spread_evenly_and_nobody_sees_a_pair_twice(opened):
    store = opened(7, votes=4, check_share=0.0)
    people, seen = [store.join() for _ in range(6)], {}
    for turn in range(7 * 4):
        person = next(p for p in people[turn % 6 :] + people if store.next_task(p) is not None)
        shown = answer(store, person)
        assert shown.task not in seen.setdefault(person, set())
        seen[person].add(shown.task)
        counts = Counter(store.votes().task)
        assert max(counts.values()) - min(counts.get(task, 0) for (task,) in store.read("SELECT id FROM tasks")) <= 1
    assert set(Counter(store.votes().task).values()) == {4}
    assert [store.next_task(person) for person in people] == [None] * 6


def test_numbers_count_what_an_assessor_saw(opened):
    store = opened(3, check_share=0.0)
    token = store.join()
    assert [answer(store, token).number for _ in range(3)] == [1, 2, 3]


def test_each_method_stands_on_each_side_as_often(opened):
    store = opened(6, votes=4, check_share=0.0)
    lefts = Counter()
    for _ in range(4):
        token = store.join()
        while shown := answer(store, token, "tie"):
            lefts[shown.task, method_in((store.file.parent / "pictures" / shown.left).read_bytes())] += 1
    assert len(lefts) == 12
    assert set(lefts.values()) == {2}


def test_a_side_is_recorded_as_the_method_that_stood_there(opened):
    store = opened(5, votes=2, check_share=0.0)
    for side in ("left", "right"):
        token = store.join()
        while shown := store.next_task(token):
            method = method_in((store.file.parent / "pictures" / getattr(shown, side)).read_bytes())
            store.vote(token, shown.task, side)
            (row,) = store.votes().query("assessor == @token and task == @shown.task").to_dict("records")
            assert row[row["choice"]] == method


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_checks_come_at_their_share_wherever_one_stops(opened, share):
    store, firsts = opened(18, votes=100, check_share=share), set()
    checks = {task for (task,) in store.read("SELECT id FROM tasks WHERE b IS NULL")}
    for phase in (0.0, 0.3, 0.6, 0.9):
        token = store.join()
        store.connection.execute("UPDATE assessors SET phase = ? WHERE token = ?", (phase, token))
        seen = [answer(store, token).task in checks for _ in range(18)]
        assert all(abs(sum(seen[:count]) - share * count) < 1 for count in range(1, 19))
        firsts.add(seen.index(True))
    assert len(firsts) > 1


def test_a_check_comes_only_while_there_are_pairs(opened):
    store = opened(2, votes=1, check_share=0.5)
    first, late = store.join(), store.join()
    while answer(store, first):
        pass
    store.connection.execute("UPDATE assessors SET phase = 0.9 WHERE token = ?", (late,))
    assert store.next_task(late) is None


def test_nobody_can_tell_where_checks_come(opened):
    store = opened()
    phases = [phase for _ in range(8) if store.join() for (phase,) in store.read("SELECT phase FROM assessors")]
    assert all(0 <= phase < 1 for phase in phases)
    assert len(set(phases)) == 8


def test_without_checks_there_are_none(opened):
    store = opened(3, check_share=0.0)
    assert store.read("SELECT count(*) FROM tasks WHERE b IS NULL") == [(0,)]


def test_an_unanswered_task_is_shown_again(opened):
    store = opened(3)
    token = store.join()
    first = store.next_task(token)
    assert store.next_task(token) == first
    store.vote(token, first.task, "tie")
    assert store.next_task(token).task != first.task


def test_what_is_given_out_is_kept_for_a_while_and_then_given_to_others(opened, monkeypatch):
    store = opened(2, votes=1, check_share=0.0)
    first, second, third = store.join(), store.join(), store.join()
    abandoned = store.next_task(first)
    assert answer(store, second).task != abandoned.task
    assert store.next_task(third) is None
    later = store_module.time.time() + store_module.PATIENCE + 1
    monkeypatch.setattr(store_module.time, "time", lambda: later)
    assert answer(store, third).task == abandoned.task
    assert store.vote(first, abandoned.task, "left") == "left"  # late, and counted all the same
    assert len(store.votes()) == 3


def test_a_vote_counts_once_and_the_first_time(opened):
    store = opened(2)
    token = store.join()
    task = store.next_task(token).task
    with ThreadPoolExecutor(16) as pool:
        answers = set(pool.map(lambda i: store.vote(token, task, ("left", "right")[i % 2]), range(64)))
    assert len(answers) == 1
    assert len(store.votes()) == 1
    with pytest.raises(sqlite3.IntegrityError):
        store.connection.execute("INSERT INTO votes SELECT * FROM votes")


def test_many_at_once_get_tasks_of_their_own(opened):
    store = opened(10, votes=3, check_share=0.0)

    def work(_):
        token = store.join()
        while answer(store, token, "tie"):
            pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(24)))
    assert set(Counter(store.votes().task).values()) == {3}


def test_a_task_that_another_server_is_giving_out_is_not_given_twice(opened):
    store = opened(2, votes=1, check_share=0.0)
    tokens, ((task,), _) = (store.join(), store.join()), store.read("SELECT id FROM tasks ORDER BY place")
    other = sqlite3.connect(store.file, isolation_level=None)
    with ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO votes VALUES (?, ?, 1, 0, ?, NULL, NULL)", (tokens[0], task, time.time()))
        waiting = pool.submit(store.next_task, tokens[1])
        time.sleep(0.3)
        other.execute("COMMIT")
    other.close()
    assert waiting.result().task != task


def test_a_vote_on_what_was_not_given_is_none(opened):
    store = opened(2, check_share=0.0)
    token, other = store.join(), store.join()
    task = store.next_task(token).task
    assert store.vote(other, task, "left") is None
    assert store.vote(token, "nothing", "left") is None
    assert store.votes().empty


def test_votes_name_both_methods_and_checks_only_one(opened):
    store = opened(4, tuple(COLORS), votes=1, check_share=0.2)
    token = store.join()
    while answer(store, token):
        pass
    votes = store.votes()
    assert set(votes.kind) == {"recolour", "add"}
    assert set(votes.benchmark) == {"edits"}
    assert votes.b.notna().sum() == 12
    assert 1 < votes.b.isna().sum() <= 3


def test_what_a_killed_server_committed_is_there(opened):
    """A second connection sees each vote at once, without the first being closed."""
    store = opened(2)
    token = store.join()
    answer(store, token)
    other = Store(store.file.parent)
    assert len(other.votes()) == 1
    assert other.knows(token)
    other.close()


def test_nobody_begins_while_too_many_who_began_have_not_voted(opened, monkeypatch):
    monkeypatch.setattr(store_module, "MOST_IDLE", 3)
    store = opened(4)
    people = [store.join() for _ in range(3)]
    assert store.join() is None
    answer(store, people[0])
    assert store.join() is not None
    assert store.join() is None
    monkeypatch.setattr(store_module, "PATIENCE", -1.0)  # half an hour later
    assert store.join() is not None
