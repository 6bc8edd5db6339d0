import os
import sys
from pathlib import Path
from subprocess import run

import pytest

from icd_lightning.files import write_whole


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
