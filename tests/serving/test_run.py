"""The entry script of the server: what it refuses before Ray starts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.exports import write_export
from tests.serving.served import ROOT


def _refused(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "serving/run.py"), "--profile", "embedded", "--profile", "tiny"]
    command += ["--base", str(folder / "base"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=110)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert list(folder.iterdir()) == [folder / "base"], "nothing is written"
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "by a server that would share it"])
def test_a_port_that_is_taken_is_refused(tmp_path: Path, shares: bool) -> None:
    """Ray's own proxies share ports: without this, two servers would answer every other request each."""
    write_export(tmp_path / "base", "t2v_192p_12fps")
    with socket.socket() as other:
        if shares:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        told = _refused(tmp_path, "--port", str(port))
    assert f"127.0.0.1:{port} is taken" in told and "--port" in told


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    write_export(tmp_path / "base", "t2v_192p_12fps")
    assert "198.51.100.7:8000 cannot be listened at" in _refused(tmp_path, "--host", "198.51.100.7")
