import os
import sys
from itertools import pairwise
from pathlib import Path
from subprocess import run

import pytest

from icd_lightning.files import (
    as_seen_here,
    cache_folder,
    check_place,
    read_csv,
    read_object,
    read_yaml,
    replaced_folder,
    write_whole,
)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, lambda temporary: temporary.write_text("first"))

    def fail(temporary: Path) -> None:
        temporary.write_text("sec")
        assert path.read_text() == "first"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_named_by_what_is_written(tmp_path):
    full = Path("/dev/full")
    said = r"^cannot write .*there: its disk is full, make room or name another place$"
    with pytest.raises(OSError, match=said):
        write_whole(tmp_path / "there", lambda _: full.write_text("a"))
    with pytest.raises(OSError, match=said), replaced_folder(tmp_path / "there"):
        full.write_text("a")
    assert not list(tmp_path.iterdir())


def test_a_file_gets_the_rights_that_any_new_file_has(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new" / "a.txt", lambda temporary: temporary.write_text("a"))
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "a.txt").stat().st_mode & 0o777 == 0o640


def test_the_module_itself_needs_nothing_but_the_standard_library():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'icd_lightning')!r}); import files; "
    code += "assert not {'torch', 'numpy', 'icd_lightning'} & sys.modules.keys()"
    assert run([sys.executable, "-c", code]).returncode == 0


BOMB = "\n".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"a: &a [x]\n{BOMB}", "aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "aliases stand for more than 100,000 values"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("# " + "x" * (1 << 20), "has 1,048,578 bytes, more than"),
        ("a: [", "is no YAML file"),
        ("!!python/object/apply:os.system [ls]", "is no YAML file"),
    ],
)
def test_a_yaml_file_of_any_shape_is_read_in_bounded_time_or_refused_by_name(tmp_path, text, complaint):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=complaint) as refused:
        read_yaml(tmp_path / "x.yaml")
    assert str(tmp_path / "x.yaml") in str(refused.value)


def test_yaml_is_read_with_its_aliases(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_a_json_file_too_large_or_too_deep_is_refused_by_name(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is no JSON"):
        read_object(tmp_path / "deep.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match=r"large\.json .*more than the 67,108,864"):
        read_object(tmp_path / "large.json")


def test_a_user_without_a_home_is_told_how_to_go_without(tmp_path, monkeypatch):
    def nowhere() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(OSError, match="no home to keep files in: name a folder by XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "icd_lightning"


TABLES = {
    "a byte order mark": ("\ufeffa,b\n1,2\n", [{"a": "1", "b": "2"}]),
    "Windows' ends of lines": ("a,b\r\n1,2\r\n", [{"a": "1", "b": "2"}]),
    "an old Mac's": ("a,b\r1,2\r", [{"a": "1", "b": "2"}]),
    "spaces around names": (" a , b\n1, 2\n", [{"a": "1", "b": "2"}]),
    "a comma unquoted": ("a,b\n1,2,3\n", [{"a": "1", "b": "2", None: ["3"]}]),
    "a cell less": ("a,b\n1\n", [{"a": "1", "b": None}]),
    "another encoding": ("a,b\né,2\n".encode("cp1252"), [{"a": "\ufffd", "b": "2"}]),
    "nothing": ("", []),
    "a name twice": ("a,b,a\n1,2,3\n", "x.csv has two columns a: leave one"),
    "a quote left open": ('a,b\n1,"2\n3,4\n', "x.csv cannot be read as a CSV file"),
    "a cell without end": (f"a,b\n1,{'x' * 200_000}\n", "x.csv cannot be read as a CSV file"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_row_by_row_or_refused_by_name(tmp_path, name):
    content, expected = TABLES[name]
    file = tmp_path / "x.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        assert list(read_csv(file)) == expected
        return
    with pytest.raises(ValueError, match=expected):
        list(read_csv(file))


def test_json_may_have_a_byte_order_mark_and_other_encodings_are_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_object(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(ValueError, match=r"x\.json is no text in UTF-8"):
        read_object(tmp_path / "x.json")


def test_where_no_file_can_be_made_is_said_before(tmp_path, monkeypatch):
    check_place(tmp_path / "new" / "deep" / "x.png")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"into .*file: that is a file, name another place"):
        check_place(tmp_path / "file" / "deep" / "x.png")
    monkeypatch.setattr("os.access", lambda *_: False)  # root, who runs many tests, may write everywhere
    with pytest.raises(OSError, match="you may not write there, name another place"):
        check_place(tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_outside_of_the_working_folder_is_called_the_same_from_everywhere(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("data", "here", "there")]
    for place in places:
        place.mkdir()
    seen = set()
    for folder in places[1:]:
        monkeypatch.chdir(folder)
        seen |= {as_seen_here("../data"), as_seen_here(str(places[0]))}
    assert seen == {str(places[0])}
    monkeypatch.chdir(tmp_path)
    assert {as_seen_here("./data"), as_seen_here(str(places[0]))} == {"data"}
    assert as_seen_here("nowhere/") == "nowhere/"
