"""Rows gathered in one go, after a kill, and by two processes are the same rows."""

import json

import pytest
from ranks_case import run_ranks

from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.rows import Ranks, gather_rows, read_rows, write_rows

EXAMPLES = [Example(f"picture/{i}", f"caption {i}") for i in range(11)]


def measure(batch):
    return [{"key": example.key, "seed": example.seed(0), "size": len(batch), "none": None} for example in batch]


def gather(folder, examples=EXAMPLES, measure=measure, ranks=None):
    return gather_rows(folder, examples, measure, batch_size=3, ranks=ranks or Ranks())


def test_rows_come_in_the_order_of_their_examples(tmp_path):
    rows = gather(tmp_path)
    assert [row["key"] for row in rows] == [example.key for example in EXAMPLES]
    assert [row["size"] for row in rows] == [3] * 9 + [2] * 2


def test_a_killed_run_goes_on_and_measures_nothing_twice(tmp_path):
    measured = []

    def dies(batch):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(batch)
        return measure(batch)

    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path / "killed", measure=dies)
    again = []
    rows = gather(tmp_path / "killed", measure=lambda batch: again.append(batch) or measure(batch))
    assert rows == gather(tmp_path / "unbroken")
    assert [example for batch in (*measured, *again) for example in batch] == EXAMPLES


def test_a_batch_that_dies_in_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(Exception, match="object"):
        write_rows(tmp_path / "rows.parquet", [{"value": object()}])
    assert not list(tmp_path.iterdir())


def test_more_examples_measure_only_what_is_new(tmp_path):
    gather(tmp_path, EXAMPLES[:6])
    again = []
    rows = gather(tmp_path, measure=lambda batch: again.append(batch) or measure(batch))
    assert rows == measure(EXAMPLES[:3]) + measure(EXAMPLES[3:6]) + measure(EXAMPLES[6:9]) + measure(EXAMPLES[9:])
    assert [example for batch in again for example in batch] == EXAMPLES[6:]


def test_other_examples_are_never_mixed_up_with_those_before(tmp_path):
    gather(tmp_path)
    other = [Example(f"other/{i}", "") for i in range(11)]
    assert [row["key"] for row in gather(tmp_path, other)] == [example.key for example in other]


def test_what_a_file_now_says_otherwise_is_measured_anew(tmp_path):
    gather(tmp_path)
    changed = [*EXAMPLES[:4], Example("picture/4", "another caption"), *EXAMPLES[5:]]
    again = []
    gather(tmp_path, changed, lambda batch: again.append(batch) or measure(batch))
    assert again == [changed[3:6]]


def test_rows_survive_a_file(tmp_path):
    rows = [{"a": 1.5, "b": None, "c": "x"}, {"a": float("inf"), "b": 2.0, "c": "ü"}]
    write_rows(tmp_path / "x.parquet", rows)
    assert read_rows(tmp_path / "x.parquet") == rows


def test_a_batch_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size 0 must be 1 or more"):
        gather_rows(tmp_path, EXAMPLES, measure, batch_size=0)


def worker(rank, folder):
    mine = []
    rows = gather(
        folder / "rows",
        measure=lambda batch: mine.append(batch[0].key) or measure(batch),
        ranks=Ranks.from_environment(),
    )
    (folder / f"rank{rank}.json").write_text(json.dumps([mine, rows]))


def test_two_processes_share_the_batches_and_both_get_all_rows(tmp_path):
    assert run_ranks(worker, tmp_path) == [0, 0]
    (mine, rows), (others, same) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert (mine, others) == (["picture/0", "picture/6"], ["picture/3", "picture/9"])
    assert rows == same == gather(tmp_path / "one")
