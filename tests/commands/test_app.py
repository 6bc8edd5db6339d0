"""`icd app`, from the command line."""

import logging
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from running_case import running

from icd_lightning.commands import app as command
from icd_lightning.commands.main import main


@pytest.fixture
def taken():
    """A port at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--port {taken}", "cannot listen at 127.0.0.1, port {taken} (Address already in use): give another --port or"),
        ("--port 65536", "cannot listen at 127.0.0.1, port 65536 ("),
        ("--host 203.0.113.1", "cannot listen at 203.0.113.1, port 0 (Cannot assign requested address): give another"),
        ("--model nowhere", "no model at 'nowhere': name a folder"),
        ("--forward nowhere", "no student at nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, monkeypatch, taken, args, message):
    monkeypatch.setitem(sys.modules, "icd_lightning.apps.editor.page", None)  # nothing is loaded before
    with pytest.raises(SystemExit) as stop:
        main(["app", *args.format(taken=taken).split()])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"icd: error: {message.format(taken=taken)}")


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["app"])
    told = "icd: error: icd app needs gradio, which is not installed: pip install '.[app]' in the repository\n"
    assert capsys.readouterr().err == told


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_it_serves_the_model_that_is_named(random_family, port, monkeypatch, caplog):
    pages = []
    monkeypatch.setattr(command, "wait", lambda: pages.append(httpx.get(f"http://127.0.0.1:{port}", timeout=60).text))
    caplog.set_level(logging.INFO)
    main(["app", "--model", str(random_family), "--device", "cpu", "--port", str(port)])
    assert random_family.name in pages[0]
    assert f"http://127.0.0.1:{port}/ (Ctrl-C ends it)" in caplog.messages
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_removes_what_was_sent(random_family, port, tmp_path, number, code):
    args = ["app", "--model", str(random_family), "--port", str(port)]
    program = [sys.executable, "-m", "icd_lightning.commands.main", *args]
    with running(
        program, stderr=subprocess.PIPE, text=True, env=os.environ | {"GRADIO_TEMP_DIR": str(tmp_path)}
    ) as process:
        lines = [process.stderr.readline()]
        while "http" not in lines[-1]:
            lines.append(process.stderr.readline())
        files = {"files": ("a.png", b"a picture")}
        httpx.post(f"http://127.0.0.1:{port}/gradio_api/upload", files=files, timeout=60).raise_for_status()
        assert [path for path in tmp_path.rglob("*") if path.is_file()]
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        lines += process.stderr.readlines()
    assert [line for line in lines if "Loading weights" not in line] == [f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
