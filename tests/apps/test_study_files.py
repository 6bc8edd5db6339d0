"""icd study create: what is in a study's folder, and what may not go into it."""

import re
import sqlite3
from collections import Counter
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from study_case import COLORS, PROMPT, Assessor, make_study, method_in, served, solid, told, write_edits

from icd_lightning.apps.study.create import create_study
from icd_lightning.apps.study.edits import read_edits
from icd_lightning.apps.study.store import FILE, Plan, Store
from icd_lightning.commands.main import main
from icd_lightning.data.images import save_png
from icd_lightning.evaluation.benchmark import Measured, Outcome, Settings
from icd_lightning.evaluation.runs import Run, perform
from icd_lightning.evaluation.suite import write_summary
from icd_lightning.tiny.benchmarks import data_set, held_out_scenes, scene_edits
from icd_lightning.tiny.scenes import HELD_OUT_SEED

PLACES = ("source", "reference", "picture_a", "picture_b")
COLUMNS = "key, kind, prompt, a, b, source, reference, picture_a, picture_b, swapped"


def tasks_of(study):
    store = Store(study)
    rows = store.read(f"SELECT {COLUMNS} FROM tasks ORDER BY place")
    store.close()
    return [dict(zip(COLUMNS.split(", "), row, strict=True)) for row in rows]


def without_names(tasks):
    """What a seed decides."""
    return [(task["key"], task["a"], task["b"], task["swapped"]) for task in tasks]


def test_every_two_methods_meet_on_every_picture(tmp_path):
    study = make_study(tmp_path, 5, tuple(COLORS), check_share=0.25)
    tasks = tasks_of(study)
    pairs = [task for task in tasks if task["b"]]
    assert len({(task["key"], task["a"], task["b"]) for task in pairs}) == len(pairs) == 15
    assert {(t["a"], t["b"]) for t in pairs} == {tuple(list(COLORS)[i] for i in ij) for ij in ((0, 1), (0, 2), (1, 2))}
    assert len(tasks) - len(pairs) == 5  # a quarter of 20
    assert {task["prompt"] for task in tasks} == {f"{PROMPT} {number}" for number in range(5)}
    for task in pairs:
        shown = [method_in((study / "pictures" / task[name]).read_bytes()) for name in ("picture_a", "picture_b")]
        assert shown == [task["a"], task["b"]]


def test_a_check_shows_an_edit_beside_what_is_none(tmp_path):
    study = make_study(tmp_path, 8, check_share=0.5)
    checks = [task for task in tasks_of(study) if task["b"] is None]
    assert len(checks) == 8
    wrong = [Image.open(study / "pictures" / check["picture_b"]).convert("RGB") for check in checks]
    for check, picture in zip(checks, wrong, strict=True):
        assert method_in((study / "pictures" / check["picture_a"]).read_bytes()) == check["a"]
        assert picture.getpixel((0, 0)) != Image.open(study / "pictures" / check["source"]).getpixel((0, 0))
    assert Counter(len(picture.getcolors(256)) > 100 for picture in wrong) == {True: 4, False: 4}  # noise, originals


def test_files_say_nothing_of_methods(tmp_path):
    study = make_study(tmp_path, 4, check_share=0.5)
    for file in (study / "pictures").iterdir():
        assert re.fullmatch(r"[0-9a-f]{24}\.png", file.name)
        assert Image.open(file).info == {}
        assert b"method" not in file.read_bytes()
    used = [task[name] for task in tasks_of(study) for name in ("picture_b",)]
    assert len(set(used)) == len(used)


def test_pictures_of_a_task_have_one_size(tmp_path):
    results, folders = write_edits(tmp_path, 2)
    save_png(solid((0, 9, 0), 24), tmp_path / "method-ours" / "000.png", about={})
    save_png(solid((0, 0, 9), 24)[:20], tmp_path / "method-theirs" / "001.png", about={})
    save_png(solid((1, 2, 3), 40)[:, :30], tmp_path / "001.png", about={})
    create_study(read_edits(results, folders, None), Plan(check_share=0.5), tmp_path / "study")
    for file in (tmp_path / "study" / "pictures").iterdir():
        assert Image.open(file).size == (16, 16)


def test_a_seed_decides_order_sides_and_checks(tmp_path):
    first, again, other = (
        without_names(tasks_of(make_study(tmp_path / name, 12, seed=seed, check_share=0.2)))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again != other
    assert [key for key, *_ in first] != sorted(key for key, *_ in first)
    assert {swapped for *_, swapped in first} == {0, 1}


def test_a_table_names_outputs_references_and_types(tmp_path):
    for name, color in (("in.png", (9, 9, 9)), ("true.png", (7, 7, 7)), ("a/x.png", (1, 1, 1)), ("b/x.png", (2, 2, 2))):
        save_png(solid(color), tmp_path / name, about={})
    for folder in "ab":
        save_png(solid((3, 3, 3)), tmp_path / folder / "in-edited.png", about={})
    table = tmp_path / "edits.csv"
    table.write_text("file_name,edited_caption,reference,kind,output\nin.png,one,true.png,add,x.png\nin.png,two,,,\n")
    (edits,) = read_edits([str(table)], [f"{name}={tmp_path / name}" for name in "ab"], ["b", "a"])
    assert list(edits.files) == ["b", "a"]
    assert [file.name for file in edits.files["a"]] == ["x.png", "in-edited.png"]
    assert [one.kind for one in edits.examples] == ["add", ""]
    assert (edits.examples[0].truth.draw(4) == 7).all()
    assert edits.examples[1].truth is None


def write_eval(out, benchmark, data, levels):
    """What icd eval leaves of methods that make pictures of one grey level each."""

    def grey(level, batch):
        yield Outcome("w 3", torch.full((len(batch), 3, 64, 64), level), 8, 0.1)
        yield Outcome("w 5", torch.ones(len(batch), 3, 64, 64), 8, 0.1)

    runs = [perform(Run(name, out, data, partial(grey, level), {"method": name}, 64)) for name, level in levels.items()]
    write_summary(Measured(Settings(benchmark, count=len(data.examples)), data, {"editing": runs}, out), [])
    return out


def test_what_icd_eval_wrote_becomes_a_study(tmp_path):
    data = data_set(scene_edits(3, HELD_OUT_SEED))
    out = write_eval(tmp_path / "edits", "tiny_edit", data, {"icd": -1.0, "nti": 0.0, "sdedit": -0.5})
    more = write_eval(tmp_path / "more", "tiny_edit", data, {"npi": 0.5})
    main(["study", "create", *map(str, (out, more)), "--out", str(tmp_path / "study"), "--methods", "npi,icd"])
    store, pairs = Store(tmp_path / "study"), [task for task in tasks_of(tmp_path / "study") if task["b"]]
    assert store.plan == Plan()
    store.close()
    assert {(task["a"], task["b"]) for task in pairs} == {("npi", "icd")}
    assert {(t["prompt"], t["kind"]) for t in pairs} == {(one.target, one.kind) for one in data.examples}
    by_key = {example.key: example for example in data.examples}
    for task in pairs:  # of the first setting
        pixels = {n: np.asarray(Image.open(tmp_path / "study" / "pictures" / task[n])) for n in PLACES}
        assert [np.unique(pixels[name]).tolist() for name in ("picture_a", "picture_b")] == [[191], [0]]
        assert (pixels["source"] == by_key[task["key"]].picture.draw(64)).all()
        assert (pixels["reference"] == by_key[task["key"]].truth.draw(64)).all()


def test_results_that_are_not_of_edits_or_not_whole_are_refused(tmp_path, capsys, monkeypatch):
    data, levels = data_set(scene_edits(2, HELD_OUT_SEED)), {"icd": 0.0, "nti": 0.5}
    out = write_eval(tmp_path / "edits", "tiny_edit", data, levels)
    other = write_eval(tmp_path / "other", "tiny_edit", data_set(scene_edits(3, HELD_OUT_SEED)), {"npi": 0.0})
    back = write_eval(tmp_path / "back", "inversion", held_out_scenes(2), levels)
    create = ("create", "--out", tmp_path / "none")
    assert "tiny_edit.json was measured on other examples of tiny_edit" in told(capsys, *create, out, other)
    assert "tiny_edit.json has icd on tiny_edit, as the results before it have: leave one out" in told(
        capsys, *create, out, out
    )
    assert "inversion is no benchmark of edits" in told(capsys, *create, back)
    (picture,) = out.glob("nti-*/images/w-3/*-00000.png")
    save_png(solid((0, 0, 0)), picture, about={"example": "another"})
    assert f"{picture} is not a result of" in told(capsys, *create, out)
    picture.unlink()
    line = told(capsys, *create, out)
    assert f"nti lacks 1 of 2 pictures of tiny_edit, the first is {picture}: make them, or leave nti out" in line
    summary = out / "tiny_edit.json"
    text = summary.read_text()
    summary.write_text(text.replace('"benchmark": "tiny_edit"', '"benchmark": "nothing"'))
    assert "benchmark 'nothing'" in told(capsys, *create, out)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nX = 1")
    monkeypatch.syspath_prepend(tmp_path)
    summary.write_text(text.replace('"benchmark": "tiny_edit"', '"benchmark": "evil.X"'))
    assert f"{summary} names evil.X, which is not of icd_lightning" in told(capsys, *create, out)
    assert not (tmp_path / "ran").exists()
    summary.write_text(text.replace('"count": 2', '"count": "2"'))
    assert f"{summary} holds settings that icd eval does not write" in told(capsys, *create, out)
    summary.write_text(text.replace('"settings"', '"other"'))
    assert "does not say its benchmark" in told(capsys, *create, summary)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--folders", "a"], "must be a NAME=FOLDER for each method"),
        (["--folders", "a=x", "=y"], "must be a NAME=FOLDER for each method"),
        (["--folders", "a=x", "a=y"], "must be a NAME=FOLDER for each method"),
        (["--methods", "method-ours"], "has 3 edits by 1 methods: a study compares at least 2 of each"),
        (["--methods", "method-ours,nti"], "has no method 'nti', only method-ours, method-theirs"),
        (["--folders", "a=x", "b=x"], "must be a NAME=FOLDER for each method, no folder twice"),
        (["--folders", "a=x", "b\nc=y"], "method 'b\\nc' must have a name that can be printed in a line"),
        (["--votes", "0"], "votes 0 must be from 1 to 1,000,000"),
        (["--votes", str(1 << 63)], "votes 9223372036854775808 must be from 1 to 1,000,000"),
        (["--title", "caf\udce9"], "title 'caf\\udce9' must be a line of text"),
        (["--check-share", "0.6"], "check_share 0.6 must be from 0 to 0.5"),
        (["--check-share", "nan"], "check_share"),
        (["--seed", "-1"], "seed -1 must be 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, capsys, change, complaint):
    results, folders = write_edits(tmp_path, 3)
    options = ["--folders", *folders, *change] if "--folders" not in change else change
    assert complaint in told(capsys, "create", *results, "--out", tmp_path / "study", *options)
    assert not (tmp_path / "study").exists()


def test_edits_that_do_not_fit_together_are_refused(tmp_path, capsys):
    results, folders = write_edits(tmp_path, 3)
    create = ("create", *results, "--out", tmp_path / "study")
    assert "go together" in told(capsys, *create)
    assert "go together" in told(capsys, "create", tmp_path, "--folders", *folders)
    assert "holds 0 summaries" in told(capsys, "create", tmp_path)
    assert "there is nothing to compare" in told(capsys, "create")
    assert "two sets of edits called edits" in told(capsys, "create", *results * 2, "--folders", *folders)
    (tmp_path / "method-ours" / "001.png").unlink()
    line = told(capsys, *create, "--folders", *folders)
    assert re.search(r"method-ours lacks 1 of 3 pictures of edits, the first is \S+001.png: make them, or leave", line)
    save_png(solid((0, 0, 0)), tmp_path / "method-ours" / "001.png", about={})
    (tmp_path / "method-theirs" / "002.png").write_bytes(b"no picture")
    assert "002.png cannot be read as a picture" in told(capsys, *create, "--folders", *folders)
    table = tmp_path / "edits.csv"
    table.write_text("image,target\n000.png,a\n000.png,b\n")
    assert "'000.png' comes 2 times: tell the edits apart by a column output" in told(
        capsys, *create, "--folders", *folders
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"edits.csv", "000.png", "001.png", "002.png", *COLORS}


def test_a_study_is_replaced_when_told_and_never_its_votes(tmp_path, capsys):
    study = make_study(tmp_path, 3)
    results, folders = write_edits(tmp_path, 2)
    create = ("create", *results, "--folders", *folders, "--out", study)
    assert "holds a study; name another --out, or replace it, while it has no votes, by --overwrite" in told(
        capsys, *create
    )
    (study / "notes.txt").write_text("mine")
    main(["study", *map(str, create), "--overwrite", "--check-share", "0"])
    assert len(tasks_of(study)) == 2
    assert len(list((study / "pictures").iterdir())) == 6
    assert (study / "notes.txt").read_text() == "mine"
    store = Store(study)
    token = store.join()
    store.vote(token, store.next_task(token).task, "tie")
    store.close()
    before = (study / FILE).read_bytes()
    capsys.readouterr()
    assert "holds 1 votes, which are never replaced: name another --out" in told(capsys, *create, "--overwrite")
    assert (study / FILE).read_bytes() == before


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "album" / "pictures").mkdir(parents=True)
    (tmp_path / "album" / "pictures" / "mine.png").write_text("mine")
    results, folders = write_edits(tmp_path, 2)
    create = ("create", *results, "--folders", *folders, "--overwrite", "--out", tmp_path / "album")
    assert "album is not empty and holds no study: name another --out" in told(capsys, *create)
    assert [path.name for path in (tmp_path / "album").rglob("*")] == ["pictures", "mine.png"]


def test_a_study_that_is_served_is_not_replaced(tmp_path, capsys):
    study = make_study(tmp_path, 2)
    results, folders = write_edits(tmp_path, 3)
    create = ("create", *results, "--folders", *folders, "--overwrite", "--out", study)
    with served(study) as port:
        assert "is being served: stop that first" in told(capsys, *create)
        assert Assessor(port).task() is not None
    main(["study", *map(str, create)])  # the remedy
    assert len({task["key"] for task in tasks_of(study)}) == 3


def damage(file, how):
    if how == "cut":
        file.write_bytes(file.read_bytes()[: 8192 + 100])
    elif how == "overwritten":
        content = bytearray(file.read_bytes())
        content[4096 : 4096 * 3] = b"\xff" * 4096 * 2
        file.write_bytes(content)
    elif how == "text":
        file.write_text("no database " * 1000)
    else:
        file.unlink()
        sqlite3.connect(file).execute("CREATE TABLE votes (x)").connection.close()


@pytest.mark.parametrize("how", ["cut", "overwritten", "text", "another's"])
@pytest.mark.parametrize("command", ["serve", "report", "create"])
def test_a_damaged_file_is_named_and_left_alone(tmp_path, capsys, how, command):
    study = make_study(tmp_path)
    damage(study / FILE, how)
    before = (study / FILE).read_bytes()
    results, folders = write_edits(tmp_path, 2)
    create = ("create", *results, "--folders", *folders, "--overwrite", "--out", study)
    line = told(capsys, *(create if command == "create" else (command, study)))
    assert f"{study / FILE} cannot be read as a study" in line
    assert "bring back a copy of it" in line
    assert (study / FILE).read_bytes() == before


SPOILT = {
    "title": "DELETE FROM settings WHERE name = 'title'",
    "seed": "DELETE FROM settings WHERE name = 'seed'",
    "votes -1": "UPDATE settings SET value = '-1' WHERE name = 'votes'",
    "check_share nan": "UPDATE settings SET value = 'nan' WHERE name = 'check_share'",
    "assessors.joined": "DROP TABLE assessors",
    "votes.voted": "ALTER TABLE votes DROP COLUMN voted",
}


@pytest.mark.parametrize("lacking", SPOILT)
@pytest.mark.parametrize("command", ["serve", "report"])
def test_a_study_of_another_shape_is_named(tmp_path, capsys, command, lacking):
    study = make_study(tmp_path)
    with closing(sqlite3.connect(study / FILE)) as connection, connection:
        connection.execute(SPOILT[lacking])
    line = told(capsys, command, study)
    assert f"{study / FILE} cannot be read as a study" in line
    assert lacking in line


@pytest.mark.parametrize("command", ["serve", "report"])
def test_without_a_study_it_is_said_what_makes_one(tmp_path, capsys, command):
    assert f"there is no study at {tmp_path}: icd study create makes one" in told(capsys, command, tmp_path)
