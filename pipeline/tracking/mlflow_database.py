"""An MLflow database file: made whole or not at all, its pictures beside it wherever it lies. MLflow is loaded late.

    mlflow.db        the database, by default in the store
    mlflow-files/    what MLflow calls artifacts: pictures and tables, a folder a run

MLflow writes the absolute place of the pictures into the database, once for each experiment and each run. A database
that was copied or moved would send new pictures to the old place, so `relocate` corrects it before it is used.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from graftwork.pipeline.store.local import DRAFTS, NO_LINKS

PICTURES = "mlflow-files"
LOCK_SECONDS = 20.0  # that another process may take for a write, as MLflow itself has it
LOOK_SECONDS = 2.0  # and for a look beforehand
_PLACE = re.compile(rf"(file:.*/{PICTURES})(?:/\d+)?$")  # of an experiment's pictures; the default one's has its id
_FILE = re.compile(r"sqlite(?:\+\w+)?:///([^?]+)")


def is_sqlite(uri: str) -> bool:
    return uri.partition(":")[0].partition("+")[0] == "sqlite"


def database_file(uri: str) -> Path | None:
    """The file of an SQLite URI; None for another URI, and for a database in memory."""
    found = _FILE.match(uri) if is_sqlite(uri) else None
    if found is None or found[1].startswith((":memory:", "file:")):
        return None
    return Path(found[1]).absolute()


def pictures_place(database: Path) -> str:
    """The URI of the folder with the pictures of a database."""
    return (database.parent.resolve() / PICTURES).as_uri()


def problem(database: Path, experiment: str) -> str | None:
    """What keeps a run from being recorded in a database, as far as can be known before; None if nothing does."""
    if not database.exists():
        there = next(folder for folder in database.parents if folder.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
        return None if writable else f"which cannot be made: {there} is not a folder that may be written"
    try:
        uri = f"file:{quote(str(database))}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=LOOK_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            deleted = _deleted(connection, experiment)
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        return None if "locked" in str(error) else f"which cannot be used: {error}"
    if deleted is not None:
        return f"whose experiment {experiment!r} is deleted; {restoring(f'sqlite:///{database}', deleted)}"
    return None if os.access(database.parent, os.W_OK) else f"which cannot be used: {database.parent} is read-only"


def restoring(uri: str, experiment_id: str) -> str:
    """What is accepted instead of a deleted experiment."""
    command = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {experiment_id}"
    return f"accepted: another tracking.experiment, or the same after: {command}"


def make(database: Path) -> None:
    """Make a database with all of MLflow's tables, if there is none; whoever else does so at the same time.

    MLflow's own way takes seconds, and two that make the same tables, or one that is killed, leave none that works.
    """
    if database.exists() and database.stat().st_size:
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    drafts = database.parent / DRAFTS
    drafts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mlflow-", dir=drafts) as folder:
        draft = Path(folder) / database.name
        SqlAlchemyStore(f"sqlite:///{draft}", pictures_place(database))._dispose_engine()
        _publish(draft, database)
    with suppress(OSError):  # others have drafts there
        drafts.rmdir()


def _publish(draft: Path, database: Path) -> None:
    """Give a draft its name, unless somebody else's has it."""
    if database.exists() and not database.stat().st_size:
        database.unlink()
    try:
        os.link(draft, database)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        draft.replace(database)


def relocate(database: Path) -> None:
    """Have a database that was copied or moved keep its pictures beside it; raises sqlite3.Error."""
    if not database.exists():
        return
    here = pictures_place(database)
    with closing(sqlite3.connect(database, timeout=LOCK_SECONDS)) as connection, connection:
        if not _has_experiments(connection):
            return
        places = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        found = {match[1] for (place,) in places if place is not None and (match := _PLACE.match(place))}
        for there in found - {here}:
            if _was_beside(database, there, here):
                for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                    begins = f"({column} = ? OR substr({column}, 1, ?) = ?)"
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {begins}",
                        (here, len(there) + 1, there, len(there) + 1, f"{there}/"),
                    )


def _was_beside(database: Path, there: str, here: str) -> bool:
    """Whether the pictures at `there` were beside this database before it was copied or moved."""
    old, new = (Path(unquote(urlsplit(place).path)) for place in (there, here))
    try:
        return new.is_dir() or not old.is_dir() or (old.parent / database.name).exists()
    except PermissionError:  # of an old place that is somebody else's
        return True


def _has_experiments(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone() is not None


def _deleted(connection: sqlite3.Connection, experiment: str) -> str | None:
    """The id of an experiment that is deleted."""
    if not _has_experiments(connection):
        return None
    query = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'"
    row = connection.execute(query, (experiment,)).fetchone()
    return None if row is None else str(row[0])
