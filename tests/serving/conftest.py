"""Job stores to test: on SQLite, and on a PostgreSQL server that is started here where its programs are found."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from serving.store import JobStore

ENVIRONMENT = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": "/"}
_schemas = itertools.count()


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def _programs() -> list[Path]:
    """Folders that may hold PostgreSQL's initdb and postgres: of the wheel `pgserver`, of the PATH, of Debian."""
    found = []
    wheel = importlib.util.find_spec("pgserver")
    if wheel is not None and wheel.origin is not None:
        found.append(Path(wheel.origin).parent / "pginstall" / "bin")
    if (on_path := shutil.which("initdb")) is not None:
        found.append(Path(on_path).parent)
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return [folder for folder in found if (folder / "initdb").is_file() and (folder / "postgres").is_file()]


def _start(programs: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A server with its files and its socket in `folder`, without a port; as root it runs as `nobody`, for it refuses root."""
    data = folder / "data"
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    who: dict[str, object] = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    make = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(make, check=True, capture_output=True, env=ENVIRONMENT, cwd=folder, timeout=60, **who)  # type: ignore[call-overload]
    serve = [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    server: subprocess.Popen[bytes] = subprocess.Popen(
        serve,
        env=ENVIRONMENT,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **who,  # type: ignore[call-overload]
    )
    give_up = time.monotonic() + 30
    status = data / "postmaster.pid"
    while not (status.exists() and status.read_text().rstrip().endswith("ready")):  # its socket is there before it answers
        if server.poll() is not None or time.monotonic() > give_up:
            server.kill()
            server.wait()
            raise OSError("the server did not start")
        time.sleep(0.05)
    return server


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of an empty PostgreSQL database of this session; skips where none can be started."""
    pytest.importorskip("psycopg")
    reasons = ["neither the wheel pgserver nor a PostgreSQL installation is there"]
    for programs in _programs():
        folder = Path(tempfile.mkdtemp(prefix="waver-pg-"))
        try:
            server = _start(programs, folder)
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{programs}: {error}")
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            server.terminate()
            server.wait(30)
            shutil.rmtree(folder, ignore_errors=True)
        return
    pytest.skip("no PostgreSQL: " + reasons[-1])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/made/by/the/store/jobs.sqlite"
    server: str = request.getfixturevalue("postgres")
    schema = f"test_{next(_schemas)}"
    engine = sqlalchemy.create_engine(server)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    engine.dispose()
    return f"{server}&options=-csearch_path%3D{schema}"


@pytest.fixture
def store(store_url: str, clock: Clock) -> Iterator[JobStore]:
    """An empty store with the fixture `clock`."""
    made = JobStore(store_url, clock=clock)
    yield made
    made.close()
