"""Rows gathered in one go, after a kill, and by two processes are the same rows."""

import json
from dataclasses import replace

import pytest
from ranks_case import run_ranks

from icd_lightning.evaluation.examples import DataSet, Example
from icd_lightning.evaluation.runs import Run

EXAMPLES = [Example(f"picture/{i}", f"caption {i}") for i in range(11)]


def measure(batch):
    return [{"key": example.key, "seed": example.seed(0), "size": len(batch), "none": None} for example in batch]


def gather(folder, examples=EXAMPLES, measure=measure, **options):
    run = Run("run", folder, DataSet(examples, "", ""), None, {}, resolution=64, batch_size=3)
    return run.gather("rows", measure, **options).to_dict("records")


def remembering(batches):
    return lambda batch: batches.append(batch) or measure(batch)


def test_a_killed_run_goes_on_and_measures_nothing_twice(tmp_path):
    measured, again = [], []

    def dies(batch):
        if len(measured) == 2:
            raise KeyboardInterrupt
        return remembering(measured)(batch)

    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path / "killed", measure=dies)
    rows = gather(tmp_path / "killed", measure=remembering(again))
    assert rows == gather(tmp_path / "unbroken")
    assert [row["key"] for row in rows] == [example.key for example in EXAMPLES]
    assert [row["size"] for row in rows] == [3] * 9 + [2] * 2
    assert [example for batch in (*measured, *again) for example in batch] == EXAMPLES


def test_what_is_new_or_now_says_otherwise_is_measured_and_nothing_else(tmp_path):
    gather(tmp_path, EXAMPLES[:6])
    again = []
    gather(tmp_path, measure=remembering(again))
    assert [example for batch in again for example in batch] == EXAMPLES[6:]
    changed = [*EXAMPLES[:4], replace(EXAMPLES[4], caption="another"), *EXAMPLES[5:]]
    again.clear()
    gather(tmp_path, changed, remembering(again))
    assert again == [changed[3:6]]


def test_a_picture_that_was_replaced_under_its_name_is_another_example(tmp_path):
    file, again = tmp_path / "a.png", []
    for content in (b"1", b"2"):
        file.write_bytes(content)
        gather(tmp_path / "rows", [Example("a", "", file)], remembering(again))
    assert len(again) == 2


def test_another_version_and_rows_that_are_not_whole_are_measured_again(tmp_path):
    gather(tmp_path, version="1")
    again = []
    gather(tmp_path, measure=remembering(again), version="2")
    assert len(again) == 4
    again.clear()
    gather(tmp_path, measure=remembering(again), version="2", is_whole=lambda rows, batch: len(rows) == 3)
    assert again == [EXAMPLES[9:]]


def test_rows_survive_a_file_and_a_failed_one_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match="object"):
        gather(tmp_path, EXAMPLES[:1], lambda batch: [{"value": object()}])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    rows = [{"a": 1.5, "b": None, "c": "x"}, {"a": float("inf"), "b": 2.0, "c": "ü"}]
    (first, second) = (gather(tmp_path / "rows", EXAMPLES[:1], lambda batch: rows) for _ in range(2))
    assert first[1] == second[1] == rows[1]


def worker(rank, folder):
    mine = []
    rows = gather(folder / "rows", measure=remembering(mine))
    (folder / f"rank{rank}.json").write_text(json.dumps([[batch[0].key for batch in mine], rows]))


def test_two_processes_share_the_batches_and_both_get_all_rows(tmp_path):
    assert run_ranks(worker, tmp_path) == [0, 0]
    (mine, rows), (others, same) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert (mine, others) == (["picture/0", "picture/6"], ["picture/3", "picture/9"])
    assert rows == same == gather(tmp_path / "one")
