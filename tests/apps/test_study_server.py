"""icd study serve: pages, refusals, blinding, and assessors whose taste the report finds again."""

import re
import socket
import sqlite3
import sys
from pathlib import Path

import pytest
from study_case import COLORS, PROMPT, Assessor, careless, liking, make_study, served, told

from icd_lightning.apps.study.report import evaluate
from icd_lightning.apps.study.store import Store

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small study, served: its folder and its port."""
    folder = make_study(tmp_path_factory.mktemp("study"), 6, votes=50)
    with served(folder) as port:
        yield folder, port


def test_a_vote_leads_to_the_next_task_and_its_link_goes_on(study):
    folder, port = study
    first = Assessor(port)
    task, _ = first.task()
    status, headers, _ = first.ask("POST", f"{first.path}/votes", f"task={task}&choice=left")
    assert (status, headers["location"]) == (303, first.path)
    again = Assessor(port, first.path)  # on another device
    assert again.task()[0] == first.task()[0] != task
    assert again.vote(task, "left") == 303  # the same, once more
    assert again.vote(task, "right") == 409
    store = Store(folder)
    assert len(store.votes().query("task == @task and assessor == @first.path[3:]")) == 1
    store.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "/a/nobody", None, 404, "Nobody has this address"),
        ("POST", "/a/nobody/votes", "task=x&choice=left", 404, "Nobody has this address"),
        ("GET", "/a/%3Cscript%3E", None, 404, "Nobody has this address"),
        ("GET", "/nothing", None, 404, "Not Found"),
        ("GET", "/pictures/nothing.png", None, 404, "Not Found"),
        ("GET", "/pictures/..%2fstudy.sqlite", None, 404, "Not Found"),
        ("GET", "/pictures/../study.sqlite", None, 404, "Not Found"),
        ("GET", "/static/../server.py", None, 404, "Not Found"),
        ("GET", "/join", None, 405, "Method Not Allowed"),
        ("DELETE", "{own}", None, 405, "Method Not Allowed"),
        ("GET", "{own}/votes", None, 405, "Method Not Allowed"),
        ("POST", "{own}/votes", "task={task}&choice=best", 400, "A choice is one of left, right, tie."),
        ("POST", "{own}/votes", "choice=left", 400, "This comparison was not given to you."),
        ("POST", "{own}/votes", "task=x&choice=left", 400, "This comparison was not given to you."),
        ("POST", "{own}/votes", "", 400, "A choice is one of"),
        ("POST", "{own}/votes", "{huge}", 413, "Content Too Large"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(study, method, path, body, status, message):
    folder, port = study
    person = Assessor(port)
    names = {"own": person.path, "task": person.task()[0], "huge": "x" * 5000}
    answered, _, page = person.ask(method, path.format(**names), body and body.format(**names))
    assert answered == status
    assert message in page.decode()
    assert b"<script>" not in page
    assert "Traceback" not in page.decode()
    store = Store(folder)
    assert store.votes().query("assessor == @person.path[3:]").empty
    store.close()


def test_a_body_without_a_length_is_bounded_too(study):
    person = Assessor(study[1])
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    person.connection.request("POST", f"{person.path}/votes", iter([b"x" * 3000] * 2), form, encode_chunked=True)
    assert person.connection.getresponse().status == 413


def test_who_leaves_in_the_middle_of_a_vote_writes_nothing_to_the_log(study, caplog):
    person = Assessor(study[1])
    with socket.create_connection(("127.0.0.1", study[1])) as leaving:
        head = f"POST {person.path}/votes HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n"
        leaving.sendall(f"{head}Content-Type: application/x-www-form-urlencoded\r\n\r\ntask=".encode())
        person.task()  # by now the server waits for the rest
    for _ in range(3):
        person.task()
    assert caplog.messages == []


def test_too_many_who_begin_are_told_to_wait(study, monkeypatch):
    monkeypatch.setattr("icd_lightning.apps.study.store.MOST_IDLE", 0)
    status, _, page = Assessor(study[1], "/").ask("POST", "/join")
    assert (status, "Too many people have just begun: try again in half an hour." in page.decode()) == (503, True)


def lose_a_picture(folder):
    next((folder / "pictures").iterdir()).unlink()


def lose_a_setting(folder):
    with sqlite3.connect(folder / "study.sqlite") as connection:
        connection.execute("DELETE FROM settings WHERE name = 'votes'")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lose_a_picture, "pictures lacks 1 of 7 pictures that .*study.sqlite names: bring back the whole folder"),
        (lose_a_setting, "study.sqlite cannot be read as a study"),
    ],
)
def test_a_study_that_lacks_something_is_not_served(tmp_path, capsys, harm, message):
    folder = make_study(tmp_path, 2, check_share=0.25)
    harm(folder)
    assert re.search(message, told(capsys, "serve", folder))


def test_what_people_write_is_shown_as_it_is(study):
    person = Assessor(study[1])
    person.task()
    page = person.seen[-1][2].decode()
    assert PROMPT not in page
    assert re.search(r"a &lt;b&gt;cat&lt;/b&gt; &amp; &#34;dog&#34; number \d", page)


def test_pages_are_kept_by_nobody_and_take_nothing_from_elsewhere(study):
    person = Assessor(study[1])
    person.task()
    _, headers, page = person.seen[-1]
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert headers["referrer-policy"] == "no-referrer"
    assert re.findall(r'(?:src|href|action)="(?!/|data:,|http://127\.0\.0\.1)([^"]*)"', page.decode()) == []


def test_a_port_in_use_is_named(study, capsys):
    folder, port = study
    line = told(capsys, "serve", folder, "--port", port)
    assert f"cannot listen at 127.0.0.1, port {port} (Address already in use): give another --port" in line
    assert "port 99999" in told(capsys, "serve", folder, "--port", "99999")
    for host in ("999.0.0.1", "e\u0301.."):  # the second has no encoding as a name
        assert f"cannot listen at {host}" in told(capsys, "serve", folder, "--host", host)


def test_without_the_extra_it_is_said_what_to_install(study, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "icd_lightning.apps.study.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    line = told(capsys, "serve", study[0])
    assert line.endswith("pip install '.[app]' in the repository")
    extra = re.search(r"^app = (.*)$", PYPROJECT.read_text(), re.MULTILINE)[1]
    assert all(f'"{package}>=' in extra for package in ("starlette", "uvicorn", "python-multipart"))


def test_a_vote_that_cannot_be_written_is_not_acknowledged(tmp_path):
    folder = make_study(tmp_path, 2)
    with served(folder) as port:
        person = Assessor(port)
        task, _ = person.task()
        store = Store(folder)
        store.connection.execute("ALTER TABLE votes RENAME TO elsewhere")
        status, _, page = person.ask("POST", f"{person.path}/votes", f"task={task}&choice=left")
        assert (status, "Nothing was recorded: try again in a minute." in page.decode()) == (503, True)
        store.connection.execute("ALTER TABLE elsewhere RENAME TO votes")
        assert person.vote(task, "left") == 303
        store.close()


def test_the_report_finds_known_preferences_and_leaves_spammers_out(tmp_path):
    """Five who like ours at 70 %, with 10 % ties, so that 75 % prefer it; two who take the worst."""
    folder = make_study(tmp_path, 24, votes=7, check_share=0.2)
    everybody = []
    with served(folder) as port:
        for number in range(7):
            everybody.append(Assessor(port))
            choose = careless if number < 2 else liking(number, "method-ours", 0.7, 0.1)
            everybody[-1].assess(choose)
    outcome = evaluate(folder, 0.75)
    overall, *_ = outcome.preferences
    assert outcome.panelists.failed == {person.path[3:] for person in everybody[:2]}
    assert (outcome.votes, outcome.short) == (5 * 24, 24)
    assert overall.preferred.low < 0.75 < overall.preferred.high
    assert overall.tied.low < 0.1 < overall.tied.high
    assert overall.preferred.high - overall.preferred.low < 0.25
    with_spammers = next(iter(evaluate(folder, 0.0).preferences)).preferred
    assert with_spammers.high < 0.75  # what leaving them out is for
    parts = [part for person in everybody for answer in person.seen for part in (str(answer[:2]).encode(), answer[2])]
    assert not [part for part in parts for name in COLORS if name.encode() in part]


KEYS = {"ArrowLeft": "left", "ArrowRight": "right", "ArrowDown": "tie"}


def test_a_browser_votes_by_keys_and_clicks_wide_and_narrow(tmp_path, browser):
    folder, seen, choices = make_study(tmp_path, 5, votes=1, check_share=0.0), [], {}
    page = browser.new_page()
    page.on("console", lambda message: seen.append(f"console: {message.text}"))
    page.on("response", lambda response: seen.append(f"{response.url} {response.all_headers()}"))
    with served(folder) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        with page.expect_navigation():
            page.get_by_role("button", name="Begin").click()
        for number, key in enumerate((*KEYS, "right", "tie"), 1):
            page.set_viewport_size({"width": (390, 1280)[number % 2], "height": 844})
            # Not wait_for_function: its polls are an eval, which the page's own policy forbids.
            assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth)")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.inner_text("footer").startswith(f"Comparison {number}.")
            choices[page.locator("input[name=task]").get_attribute("value")] = KEYS.get(key, key)
            if key == "ArrowRight":
                page.keyboard.down("ArrowLeft")  # since the page before: a key that is held repeats
                page.keyboard.up("ArrowLeft")
            with page.expect_navigation():
                if key in KEYS:
                    page.keyboard.down(key)
                else:
                    page.locator(f"button[value={key}]").click()
            page.wait_for_load_state("networkidle")
        assert "There is nothing left to compare" in page.inner_text("main")
    store = Store(folder)
    recorded = {
        task: (choice, swapped) for task, choice, swapped in store.read("SELECT task, choice, swapped FROM votes")
    }
    store.close()
    sides = {task: {"tie": "tie"}.get(c, ("left", "right")[(c == "b") != s]) for task, (c, s) in recorded.items()}
    assert sides == choices
    assert not [text for text in seen for name in ("console:", *COLORS) if name in text]
