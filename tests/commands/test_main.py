import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from icd_lightning import __version__
from icd_lightning.commands.main import COMMANDS, main
from icd_lightning.commands.parsing import _parser, call

PLAIN = {name: target for name, (target, _) in COMMANDS.items() if not target.endswith(":run")}
HEAVY = ("torch", "lightning", "diffusers", "transformers", "numpy", "PIL", "matplotlib")


def outcome(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        main(list(args))
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def load(target: str):
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"icd_lightning.commands.{module}"), name)


# Help


def test_help_imports_nothing_heavy():
    program = f"""
import os, sys
from icd_lightning.commands.main import main
for args in [[], *({list(PLAIN)!r})]:
    try:
        main([*(args.split() if args else []), "--help"])
    except SystemExit as stop:
        assert not stop.code, args
    found = [name for name in {HEAVY!r} if name in sys.modules]
    assert not found, (args, found)
assert os.environ["GOMP_SPINCOUNT"] == "2000"  # before torch, which reads it once
"""
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=own)
    assert result.returncode == 0, result.stderr
    assert "usage: icd edit" in result.stdout


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"], ["help"], ["--trust-config"], ["--trust-config", "--help"]])
def test_help_lists_every_command(capsys, args):
    code, out, err = outcome(capsys, *args)
    assert (code, err) == (0, "")
    for name, (_, line) in COMMANDS.items():
        assert name in out
        assert line in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists(name):
    assert callable(load(COMMANDS[name][0]))


@pytest.mark.parametrize("name", PLAIN)
def test_every_option_is_explained(name):
    parser = _parser(load(PLAIN[name]), name)
    assert parser.description
    silent = [action.dest for action in parser._actions if not action.help]
    assert not silent


def test_version(capsys):
    assert outcome(capsys, "--version") == (0, f"icd {__version__}\n", "")


def test_the_package_is_started_as_a_module_too():
    command = [sys.executable, "-m", "icd_lightning", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"icd {__version__}\n", "")


def test_a_group_lists_its_commands(capsys):
    code, out, _ = outcome(capsys, "data")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "icd data shapes",
        "icd data cache-latents",
        "icd data curate",
        "icd data report",
        "icd data index",
        "icd data describe",
    ]


# Mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("edti photo.png", "no command 'edti'; there is: fit, validate, test, edit"),
        ("data shape", "no command 'icd data shape'; there is: shapes, cache-latents, curate, report, index, describe"),
        ("--config conf/base.yaml fit", "--config comes before the command; write `icd COMMAND --config ...`"),
        ("eval --cuont 3", "unrecognized arguments: --cuont 3"),
        ("eval --cou 3", "unrecognized arguments: --cou 3"),
        ("eval --count three", "count: Expected a int; Given value: three"),
        ("eval --count", "argument --count: expected one argument"),
        ("ablations --seeds 0,x", "seeds '0,x' must be numbers separated by commas"),
        ("eval --model nowhere --out README.md", "README.md: that is a file, name another place"),
        (
            "demo --steps x",
            "steps: Not of type PositiveInt: invalid literal for int()",
        ),
        ("data describe", "urls [] name no shards"),
        ("data describe nowhere", "nowhere"),
        ("fit --config nowhere.yaml", "nowhere.yaml"),
        ("fit --trainer.max_stpes 3", "unrecognized arguments: --trainer.max_stpes 3"),
        ("fit --trainer.max_steps x", "trainer.max_steps: Expected a int. Got value: x"),
        ("fit --model Nothing", "model: "),
        ("data describe \x1b[2Jx", "\\x1b[2Jx"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, args, message):
    code, out, err = outcome(capsys, *args.split())
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("icd: error: ")
    assert message in err


def test_where_an_error_came_from_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("ICD_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError)):
        main(["data", "describe", "nowhere"])


# Signatures


def command(
    first: str,
    count: int = 1,
    *,
    many: list[int] | None = None,
    output: str | None = None,
    dry: bool = False,
    **options,
):
    """Do it.

    Args:
        first: The first.
        count: How many.
        many: Of them.
        output: Where to.
        dry: Do not.
    """
    called.append((first, count, many, output, dry, shared(**options)))


def shared(*, model: str = "tiny", scale: float | None = None):
    """Load.

    Args:
        model: Which.
        scale: How much.
    """
    return model, scale


def several(*words: str, flag: bool = True):
    """Say.

    Args:
        words: What.
        flag: Whether.
    """
    called.append((words, flag))


called: list[tuple] = []


def parsed(function, *args: str) -> tuple:
    called.clear()
    call(function, "do", list(args))
    return called[0]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["a"], ("a", 1, None, None, False, ("tiny", None))),
        (["a", "--count", "2", "--many", "[1, 2]"], ("a", 2, [1, 2], None, False, ("tiny", None))),
        (["a", "-o", "x"], ("a", 1, None, "x", False, ("tiny", None))),
        (["--output=x", "a", "--dry"], ("a", 1, None, "x", True, ("tiny", None))),
        (["a", "--model", "sd15", "--scale", "3"], ("a", 1, None, None, False, ("sd15", 3.0))),
    ],
)
def test_the_signature_is_the_schema(args, expected):
    assert parsed(command, *args) == expected


def test_any_number_of_words_and_a_flag_to_turn_off():
    assert parsed(several) == ((), True)
    assert parsed(several, "a", "b c", "--no_flag") == (("a", "b c"), False)


@pytest.mark.parametrize("text", ["null", "5", "1e3", "{a: b}", "[x", "a: b, 'c'", "yes", "@x", "紅い円"])
def test_text_is_taken_as_it_is(text):
    assert parsed(command, text, "--model", text)[-1][0] == text
    assert parsed(command, text)[0] == text
    assert parsed(several, text, text)[0] == (text, text)


@pytest.mark.parametrize(
    "args",
    [
        ["edit", "", "--target", "a"],
        ["edit", "x.png", "--target", "a", "--model", ""],
        ["eval", "--out="],
        ["data", "curate", "x.csv", "--out", "", "--config", "x.yaml", "--overwrite"],
    ],
)
def test_a_variable_of_the_shell_that_is_not_set_is_no_folder_here(capsys, args):
    code, _, err = outcome(capsys, *args)
    assert code == 2
    assert "is empty: give it a value, or leave it out" in err


@pytest.mark.parametrize("args", [["eval"], ["tiny", "report"], ["tiny", "jumps"], ["ablations"], ["demo"]])
def test_where_no_results_can_be_kept_is_said_before_they_are_made(capsys, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    (tmp_path / "conf").symlink_to(Path(__file__).parents[2] / "conf")
    code, _, err = outcome(capsys, *args)
    assert code == 2
    assert re.search(r"cannot write outputs/[\w-]+/results into .*outputs: that is a file, name another place", err)
