"""The study's SQLite file: tasks, assessors, and who was given which task and chose what."""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FILE, PICTURES = "study.sqlite", "pictures"  # in a study's folder
FORMAT = 0x1CD57D1  # SQLite's application_id: what the file is
PATIENCE = 1800.0
"""Seconds after which a task that was given out and not answered is given to somebody else too."""
MOST_IDLE = 1000  # assessors who began within that time and have not voted; nobody more begins
MOST_VOTES = 1_000_000  # of as many people; SQLite counts no further than 2^63
SIDES = ("left", "right", "tie")
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE tasks (
  place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, benchmark TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
  prompt TEXT NOT NULL, a TEXT NOT NULL, b TEXT, source TEXT NOT NULL, reference TEXT, picture_a TEXT NOT NULL,
  picture_b TEXT NOT NULL, swapped INTEGER NOT NULL);
CREATE TABLE assessors (token TEXT PRIMARY KEY, joined REAL NOT NULL, phase REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE votes (
  assessor TEXT NOT NULL REFERENCES assessors, task TEXT NOT NULL REFERENCES tasks (id), number INTEGER NOT NULL,
  swapped INTEGER NOT NULL, given REAL NOT NULL, choice TEXT CHECK (choice IN ('a', 'b', 'tie')), voted REAL,
  PRIMARY KEY (assessor, task)) WITHOUT ROWID;
CREATE INDEX votes_of_task ON votes (task);
"""
"""A row of votes is a task given to an assessor; its choice is NULL until there is one. b is NULL in checks."""
NEXT = """
SELECT id, (tasks.swapped + count(votes.task)) % 2 FROM tasks LEFT JOIN votes ON task = id
WHERE (b IS NULL) = :check AND id NOT IN (SELECT task FROM votes WHERE assessor = :token)
GROUP BY id HAVING :check OR sum(choice IS NOT NULL OR ifnull(given > :since, 0)) < :votes
ORDER BY sum(choice IS NOT NULL OR ifnull(given > :since, 0)), place LIMIT 1
"""
"""Of the tasks that the assessor has not had and that lack votes, one with the fewest, and whether its sides change."""

COLUMNS = "SELECT kind.name || '.' || part.name FROM sqlite_master kind, pragma_table_info(kind.name) part"

IDLE = """
SELECT count(*) FROM assessors WHERE joined > ?
AND NOT EXISTS (SELECT 1 FROM votes WHERE assessor = token AND choice IS NOT NULL)
"""


@dataclass(frozen=True)
class Plan:
    """How a study is made: votes wanted for each two edits, the share of checks among an assessor's tasks, the seed."""

    votes: int = 3
    check_share: float = 0.1
    seed: int = 0
    title: str = "Which edit is better?"

    def __post_init__(self) -> None:
        if not 1 <= self.votes <= MOST_VOTES:
            raise ValueError(f"votes {self.votes} must be from 1 to {MOST_VOTES:,}")
        if not 0 <= self.check_share <= 0.5:
            raise ValueError(f"check_share {self.check_share} must be from 0 to 0.5")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be 0 or more")
        if not self.title.isprintable():
            raise ValueError(f"title {self.title!r} must be a line of text")


@dataclass(frozen=True)
class Task:
    """Two edits of one picture, by methods `a` and `b`; in a check `b` is None, and picture_b is obviously wrong.

    Pictures are names of files; `swapped` says whether the first who sees it has a on the right.
    """

    id: str
    benchmark: str
    kind: str
    key: str
    prompt: str
    a: str
    b: str | None
    source: str
    reference: str | None
    picture_a: str
    picture_b: str
    swapped: int


@dataclass(frozen=True)
class Shown:
    """A task as an assessor sees it; `number` counts from 1."""

    task: str
    number: int
    prompt: str
    source: str
    reference: str | None
    left: str
    right: str


def create(file: Path, plan: Plan, tasks: Sequence[Task]) -> None:
    """Write a new study; the tasks come in the order in which they are given out."""
    connection = _connect(file)
    connection.execute(f"PRAGMA application_id = {FORMAT}")
    connection.executescript(SCHEMA)
    with connection:
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO settings VALUES (?, ?)", [(n, str(v)) for n, v in vars(plan).items()])
        names = ", ".join(field.name for field in fields(Task))
        marks = ", ".join("?" for _ in fields(Task))
        connection.executemany(f"INSERT INTO tasks ({names}) VALUES ({marks})", map(astuple, tasks))
    connection.close()


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=30)
    connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before it is answered
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


class Store:
    """A study's file, for one process and any number of its threads.

    FileNotFoundError or ValueError, naming it, for a file that is none or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.lock = folder / FILE, threading.Lock()
        if not self.file.is_file():
            raise FileNotFoundError(f"there is no study at {folder}: icd study create makes one")
        try:
            self.connection = _connect(self.file)
            (application,) = self.connection.execute("PRAGMA application_id").fetchone()
            (state,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
            if application != FORMAT or state != "ok":
                raise sqlite3.DatabaseError(state if application == FORMAT else "not a study's")
            self.connection.execute("PRAGMA journal_mode = WAL")  # reports read while votes are written
            told = dict(self.connection.execute("SELECT name, value FROM settings"))
            self.plan = Plan(int(told["votes"]), float(told["check_share"]), int(told["seed"]), told["title"])
            self._check_tables()
        except (sqlite3.DatabaseError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.file} cannot be read as a study ({error}): bring back a copy of it, or save what can be read "
                "by sqlite3's .recover"
            ) from error

    def _check_tables(self) -> None:
        with closing(sqlite3.connect(":memory:")) as new:
            new.executescript(SCHEMA)
            if lacking := set(new.execute(COLUMNS)) - set(self.connection.execute(COLUMNS)):
                raise KeyError(*min(lacking))

    def close(self) -> None:
        self.connection.close()

    def is_shared(self) -> bool:
        """Whether another connection is open; a file without one can leave the mode that several need."""
        self.connection.execute("PRAGMA busy_timeout = 0")
        try:
            self.connection.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.OperationalError:
            return True
        return False

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, one after another; written to the disk when it ends."""
        with self.lock, self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            yield self.connection

    def read(self, query: str, *values: object) -> list[tuple]:
        with self.lock:
            return self.connection.execute(query, values).fetchall()

    def check_pictures(self) -> None:
        """FileNotFoundError unless the pictures of all tasks are beside the file."""
        rows = self.read("SELECT source, ifnull(reference, source), picture_a, picture_b FROM tasks")
        named, folder = {name for row in rows for name in row}, self.file.parent / PICTURES
        if lacking := named - {file.name for file in folder.glob("*")}:
            raise FileNotFoundError(
                f"{folder} lacks {len(lacking)} of {len(named)} pictures that {self.file} names: bring back the whole "
                "folder that icd study create wrote"
            )

    def join(self) -> str | None:
        """A new assessor's token; None while too many who have just begun have not voted."""
        token = secrets.token_urlsafe(16)
        with self.transaction() as connection:
            if connection.execute(IDLE, (time.time() - PATIENCE,)).fetchone()[0] >= MOST_IDLE:
                return None
            phase = secrets.randbelow(1 << 32) / (1 << 32)  # nobody can tell where checks come
            connection.execute("INSERT INTO assessors VALUES (?, ?, ?)", (token, time.time(), phase))
        return token

    def knows(self, token: str) -> bool:
        return bool(self.read("SELECT 1 FROM assessors WHERE token = ?", token))

    def next_task(self, token: str) -> Shown | None:
        """The task that the assessor has not answered yet, or a new one; None if all have their votes."""
        with self.transaction() as connection:
            open_task = "SELECT task FROM votes WHERE assessor = ? AND choice IS NULL"
            if connection.execute(open_task, (token,)).fetchone() is None and not self._give(connection, token):
                return None
            row = connection.execute(
                "SELECT task, number, prompt, source, reference, picture_a, picture_b, votes.swapped "
                "FROM votes JOIN tasks ON task = id WHERE assessor = ? AND choice IS NULL",
                (token,),
            ).fetchone()
        *about, a, b, swapped = row
        return Shown(*about, *((b, a) if swapped else (a, b)))

    def _give(self, connection: sqlite3.Connection, token: str) -> bool:
        """Assign a pair of edits, or a check where it is time for one; False if no pair is left."""
        query = "SELECT phase, (SELECT count(*) FROM votes WHERE assessor = token) FROM assessors WHERE token = ?"
        phase, count = connection.execute(query, (token,)).fetchone()
        values = {"token": token, "votes": self.plan.votes, "since": time.time() - PATIENCE}
        found = connection.execute(NEXT, {**values, "check": False}).fetchone()
        if found is None:
            return False
        if int(phase + (count + 1) * self.plan.check_share) > int(phase + count * self.plan.check_share):
            found = connection.execute(NEXT, {**values, "check": True}).fetchone() or found
        task, swapped = found
        row = (token, task, count + 1, swapped, time.time())
        connection.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?, NULL, NULL)", row)
        return True

    def vote(self, token: str, task: str, side: str) -> str | None:
        """Record a choice among SIDES; return the side on record, the first one told; None if it was not asked."""
        with self.transaction() as connection:
            where = "assessor = ? AND task = ?"
            found = connection.execute(f"SELECT swapped, choice FROM votes WHERE {where}", (token, task)).fetchone()
            if found is None:
                return None
            swapped, choice = found
            choices = dict(zip(SIDES, "ba" if swapped else "ab", strict=False)) | {"tie": "tie"}
            if choice is None:
                choice, row = choices[side], (choices[side], time.time(), token, task)
                connection.execute(f"UPDATE votes SET choice = ?, voted = ? WHERE {where}", row)
        return next(side for side, one in choices.items() if one == choice)

    def votes(self) -> pd.DataFrame:
        """All choices: assessor, task, benchmark, kind, a, b (None in checks) and choice, "a", "b" or "tie"."""
        import pandas as pd

        columns = "assessor, task, benchmark, kind, a, b, choice"
        query = f"SELECT {columns} FROM votes JOIN tasks ON task = id WHERE choice IS NOT NULL ORDER BY place, assessor"
        return pd.DataFrame(self.read(query), columns=columns.split(", "))
