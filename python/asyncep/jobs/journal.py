"""What a job has done so far, so that it can be killed at any point and gone on with.

A folder ``OUT.job`` beside the output holds

    state.sqlite   answers by the digest of their text; which parts of the output are written; counts; settings
    part-NNNNNN    the rows of one window, as they stand in the output
    output.tmp     the parts joined, before it gets the output's name
    lock           held by the process that works on the job

and nothing else: a folder of that name with other files in it is somebody's, and is refused.

SQLite, because two things have to happen together or not at all (a part counts as written, and its counts are in the
totals), and because answers are looked up by text: a text met again, in the same window or a million rows later or by
the next process, is not computed again. A log of one's own would need an index, checksums and a repair of its own. The
write-ahead log is not synchronised at each commit: a kill of the process loses nothing, a loss of power the last
seconds, which are then computed again; it never ends in a state that did not exist.

A part is written under another name, synchronised, renamed, and then committed. Parts without a commit are replaced.
The output is put together from the committed parts under another name and renamed; doing so twice gives the same file.
Before a file gets its name, the journal notes what it is known again by (`own_files.identity`), so that after a kill
the job knows its own. So at every moment either the output is whole or the folder says what is missing, and no row can
be there twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (digest BLOB PRIMARY KEY, scores BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parts (number INTEGER PRIMARY KEY, counts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (number INTEGER PRIMARY KEY, figures TEXT NOT NULL);
"""
_CACHE_KIB = 16384
_OURS = re.compile(r"lock|state\.sqlite(-wal|-shm|-journal)?|part-\d+(\.tmp)?|output\.tmp")
_LOOKUP = 500  # values in one query; SQLite's limit is higher in newer versions only


class JobError(RuntimeError):
    """The job cannot be started or gone on with; says what to do."""


def digest_of(text: str) -> bytes:
    """What a text is known by: 16 bytes, the same for equal texts only."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Journal:
    """The folder of one job. Use `open_journal`; belongs to one thread.

    Attributes:
        finished: set to True when the output is in place: nothing of the folder is needed any more, and it is removed.
    """

    def __init__(self, folder: Path, database: sqlite3.Connection) -> None:
        self.folder = folder
        self.finished = False
        self._database = database
        self._run = 1 + (database.execute("SELECT max(number) FROM runs").fetchone()[0] or 0)

    @property
    def name(self) -> str:
        """What the job is called, unlike any other; made with its record."""
        name = self.get("name")
        if name is None:
            name = secrets.token_hex(8)
            self.put("name", name)
        return str(name)

    # Answers

    def known(self, digests: Sequence[bytes]) -> dict[bytes, tuple[float, ...]]:
        """Label scores of those texts that have been computed."""
        found: dict[bytes, tuple[float, ...]] = {}
        for start in range(0, len(digests), _LOOKUP):
            some = digests[start : start + _LOOKUP]
            marks = ",".join("?" * len(some))
            for digest, raw in self._database.execute(
                f"SELECT digest, scores FROM answers WHERE digest IN ({marks})", some
            ):
                found[digest] = tuple(array("d", raw))
        return found

    def remember(self, answers: Iterable[tuple[bytes, Sequence[float]]], figures: Mapping[str, float]) -> None:
        """Keeps label scores, and this run's figures so far, in one transaction."""
        rows = sorted((digest, array("d", scores).tobytes()) for digest, scores in answers)
        with self._database:
            # Sorted: the index is written in order, each of its pages once.
            self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
            self._keep_figures(figures)

    # Parts

    @property
    def done(self) -> set[int]:
        """Numbers of the parts that are written."""
        return {number for (number,) in self._database.execute("SELECT number FROM parts")}

    def part_path(self, number: int) -> Path:
        """Where a part stands."""
        return self.folder / f"part-{number:06d}"

    def add_part(self, number: int, content: bytes, counts: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Writes a part; it counts from the moment this returns, and not before."""
        path = self.part_path(number)
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        with self._database:
            self._database.execute("INSERT INTO parts VALUES (?, ?)", (number, json.dumps(counts)))
            self._keep_figures(figures)

    def counts(self) -> Iterator[dict[str, Any]]:
        """What was counted in each part, in their order."""
        for (text,) in self._database.execute("SELECT counts FROM parts ORDER BY number"):
            yield json.loads(text)

    @property
    def joined_path(self) -> Path:
        """Where the output stands until it gets its name."""
        return self.folder / "output.tmp"

    # Figures and settings

    def _keep_figures(self, figures: Mapping[str, float]) -> None:
        self._database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", (self._run, json.dumps(dict(figures))))

    def figures(self) -> list[dict[str, float]]:
        """What each run took, the first first."""
        return [json.loads(text) for (text,) in self._database.execute("SELECT figures FROM runs ORDER BY number")]

    def get(self, key: str) -> Any:
        """A value kept for the job; None if there is none."""
        row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keeps a value, such as the calibration: the next run goes on with the same."""
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))


@contextlib.contextmanager
def open_journal(
    output: Path, settings: Mapping[str, Any], *, restart: bool = False, fix: str = "--restart"
) -> Iterator[Journal]:
    """The journal of the job that writes `output`, made or gone on with, locked meanwhile.

    Args:
        settings: all that decides what the output is; a job is gone on with only under the same.
        restart: throw away what is there.
        fix: what the caller gives to do that.

    Raises:
        JobError: another process works on it, it was begun with other settings, or the folder is not a job's.
    """
    folder = journal_folder(output)
    with _locked(folder):
        ours = _contents(folder)
        if restart:
            for path in ours:
                if path.name != "lock":
                    path.unlink()
        with contextlib.closing(_open_database(folder, fix)) as database:
            journal = Journal(folder, database)
            _check_settings(journal, settings, fix)
            yield journal
        if journal.finished:
            _remove(folder)


def journal_folder(output: Path) -> Path:
    """Where the job that writes `output` keeps what it has done."""
    return output.with_name(output.name + ".job")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from working in it."""
    while True:
        if folder.is_symlink():
            raise JobError(f"{folder}: is a symbolic link, and the job makes a folder there; remove it")
        try:
            folder.mkdir(exist_ok=True)
            lock = (folder / "lock").open("a")
        except FileNotFoundError:
            if not folder.parent.is_dir():
                raise JobError(f"{folder}: there is no folder {folder.parent}; make it, or correct OUT") from None
            continue  # another process has just finished the job and removed its folder
        except OSError as error:
            raise JobError(f"{folder}: cannot be written: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError(f"{folder}: another process works on this job") from None
            if not _is_at(lock.fileno(), folder / "lock"):
                continue  # as above: what was locked is no file of the folder any more
            yield
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _contents(folder: Path) -> list[Path]:
    """The folder's files, all of which are a job's."""
    paths = list(folder.iterdir())
    for path in paths:
        if not _OURS.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            raise JobError(f"{folder}: holds {path.name}, which is no job's; move it away, or give another OUT")
    return paths


def _remove(folder: Path) -> None:
    """Takes the folder away, the lock last, and before it the record: parts without it are no job."""
    order = {"state.sqlite": 1, "lock": 2}
    for path in sorted(_contents(folder), key=lambda path: order.get(path.name, 0)):
        path.unlink()
    folder.rmdir()


def _open_database(folder: Path, fix: str) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(folder / "state.sqlite", check_same_thread=False)
        database.executescript(
            f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -{_CACHE_KIB}; {_SCHEMA}"
        )
    except sqlite3.DatabaseError as error:
        raise JobError(f"{folder}/state.sqlite: {error}; {fix} begins the job anew") from error
    return database


def _check_settings(journal: Journal, settings: Mapping[str, Any], fix: str) -> None:
    now = json.loads(json.dumps(settings))
    before = journal.get("settings")
    if before is None:
        journal.put("settings", now)
    elif before != now:
        differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        raise JobError(
            f"{journal.folder}: an unfinished job with other settings ({', '.join(differ)}); run it with the same, "
            f"or give {fix} to begin anew"
        )
