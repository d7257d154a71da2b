"""The job store's database: engine, schema, and transactions that hold what they promise on SQLite and on PostgreSQL.

SQLite (the default, for one machine: its write-ahead log does not work over a network file system). Every write transaction
starts with BEGIN IMMEDIATE, so what it reads cannot change before it writes, and two writers wait for one another instead of
failing half way. `synchronous=FULL`: a commit returns after the log is on the disk, so an accepted job survives a power cut as
well as a kill. Progress and heartbeats are written with NORMAL: a power cut may take the last of them (a kill cannot), which
costs nobody anything, and a step of the denoising loop does not wait for the disk. The file is sound in both cases.

PostgreSQL (for several machines): rows are locked with FOR UPDATE; `write(exclusive=True)` takes an advisory lock that ends with
the transaction. Timestamps are the callers' clocks, so machines need clocks that agree to well within `queue.lease_s`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, insert, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import Pool, QueuePool

from serving.tables import META, METADATA, SCHEMA_VERSION
from waver_core.errors import BackendUnavailable, ConfigError

BUSY_S = 30.0
"""A transaction waits so long for other writers, then fails with `OperationalError`."""
ADVISORY_LOCK = 0x57415645
"""Key of PostgreSQL's advisory lock ("WAVE")."""

_open: weakref.WeakSet[Database] = weakref.WeakSet()
_inherited: list[Pool] = []
_unsafe_files: set[str] = set()


class Database:
    """One database of jobs, for any number of threads. Processes open it each for themselves.

    A forked child may go on with its parent's object on PostgreSQL; on SQLite (else RuntimeError) if it was closed before.

    `url`: `sqlite:///folder/jobs.sqlite` or `postgresql+psycopg://user@host/name`. Tables are made where they are missing. Raises
    `ConfigError` for a URL of another kind, a database that does not answer, or one of another schema version.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._url = _checked(url)
        self._sqlite = self._url.get_backend_name() == "sqlite"
        self._writing = threading.Lock()
        self._engine = _sqlite_engine(self._url) if self._sqlite else _postgres_engine(self._url)
        try:
            self._make_tables()
        except DBAPIError as error:
            self._engine.dispose()
            shown = self._url.render_as_string(hide_password=True)
            reason = str(error.orig).strip().splitlines()[0]
            raise ConfigError(f"the job store {shown} cannot be opened ({reason}): check serving.storage.database") from error
        except ConfigError:
            self._engine.dispose()
            raise
        _open.add(self)

    def close(self) -> None:
        """Give back all connections. Calls after this open new ones."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, *, durable: bool = True, exclusive: bool = False) -> Iterator[Connection]:
        """A transaction that writes; all of it is kept or nothing.

        Not `durable`: a power cut may take it, though a kill cannot.
        `exclusive`: no other exclusive one runs meanwhile, on any machine (on SQLite every write is).
        """
        # Threads of one process queue up here, in order; SQLite's own waiting is by sleep and luck, and is left to processes.
        with self._writing if self._sqlite else nullcontext(), self._engine.connect() as plain:
            connection = plain.execution_options(waver_write=True, waver_durable=durable)
            with connection.begin():
                if not self._sqlite and not durable:
                    connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
                if not self._sqlite and exclusive:
                    connection.execute(select(func.pg_advisory_xact_lock(ADVISORY_LOCK)))
                yield connection

    def _make_tables(self) -> None:
        with self.write(exclusive=True) as connection:
            METADATA.create_all(connection)
            found = connection.scalar(select(META.c.value).where(META.c.name == "schema_version"))
            if found is None:
                connection.execute(insert(META).values(name="schema_version", value=str(SCHEMA_VERSION)))
                connection.execute(insert(META).values(name="identity", value=uuid.uuid4().hex))
            elif found != str(SCHEMA_VERSION):
                shown = self._url.render_as_string(hide_password=True)
                raise ConfigError(
                    f"the job store {shown} has schema version {found}, this release needs {SCHEMA_VERSION}: "
                    "point serving.storage.database at a new one, or start the release that made it"
                )

    def _after_fork(self) -> None:
        """In a forked child: let go of the parent's connections without closing them, which would end the parent's session.

        SQLite's library remembers the parent's file locks in memory that the child has inherited, though the child holds none of
        them: it would read and write without locks, or wait for ever. No new connection mends that, so such a file is refused.
        """
        pool = self._engine.pool
        if self._sqlite and isinstance(pool, QueuePool) and pool.checkedin() + pool.checkedout() > 0:
            _unsafe_files.add(_file(self._url))
        _inherited.append(pool)
        self._engine.dispose(close=False)
        self._writing = threading.Lock()


def _checked(url: str) -> URL:
    """The URL, if it is of a kind that keeps jobs."""
    try:
        parsed = make_url(url)
        driver = parsed.get_dialect().driver
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"serving.storage.database is not a database URL of use ({error}): {_FORMS}") from error
    if driver not in ("pysqlite", "psycopg"):
        raise ConfigError(f"serving.storage.database names the driver '{driver}': {_FORMS}")
    if driver == "pysqlite" and (parsed.database in (None, "", ":memory:") or "uri" in parsed.query):
        raise ConfigError(f"serving.storage.database must name a file, or jobs are lost with the process: {_FORMS}")
    return parsed


_FORMS = "use sqlite:///folder/jobs.sqlite or postgresql+psycopg://user@host/name"


def _postgres_engine(url: URL) -> Engine:
    # A process that hangs with a lock in its hand must not stop all others for good.
    own = f"-c lock_timeout={int(BUSY_S * 1000)} -c idle_in_transaction_session_timeout=60000"
    given = url.query.get("options", "")
    options = " ".join([*(given if isinstance(given, tuple) else [given]), own]).strip()
    # A node that vanishes closes no connection: without these, what waits for it waits for a quarter of an hour.
    alive = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}
    arguments: dict[str, Any] = {"connect_timeout": 10, "options": options, "application_name": "openwaver", **alive}
    try:
        return create_engine(
            url, pool_size=8, max_overflow=24, pool_pre_ping=True, isolation_level="READ COMMITTED", connect_args=arguments
        )
    except ModuleNotFoundError as error:
        raise BackendUnavailable("PostgreSQL needs its driver: pip install 'psycopg[binary]'") from error


def _sqlite_engine(url: URL) -> Engine:
    Path(str(url.database)).resolve().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, poolclass=QueuePool, pool_size=8, max_overflow=24, connect_args={"timeout": BUSY_S})

    @event.listens_for(engine, "do_connect")
    def refuse_inherited(*_: Any) -> None:
        if _file(url) in _unsafe_files:
            raise RuntimeError(
                f"{url.database} was open when this process was forked: start the process by spawn, or close it first"
            )

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        # Otherwise Python's sqlite3 would send a BEGIN of its own choice; `begin` below sends ours.
        connection.isolation_level = None
        if _write_ahead(connection) != "wal":
            connection.close()
            raise ConfigError(f"{url.database}: no write-ahead log on this file system: use a local folder, or PostgreSQL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if not options.get("waver_write"):
            connection.exec_driver_sql("BEGIN")
            return
        level = "FULL" if options["waver_durable"] else "NORMAL"
        if connection.info.get("synchronous") != level:
            connection.exec_driver_sql(f"PRAGMA synchronous={level}")
            connection.info["synchronous"] = level
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _file(url: URL) -> str:
    return os.path.realpath(str(url.database))


def _write_ahead(connection: Any) -> str:
    """Switch the file to WAL; where another process does so at the same moment SQLite says "locked" without waiting."""
    give_up = time.monotonic() + BUSY_S
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode=WAL").fetchone()[0])
        except sqlite3.OperationalError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _after_fork_in_child() -> None:
    for database in list(_open):
        database._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
