"""Entry script: start Ray Serve on this machine (or on the cluster of RAY_ADDRESS) with the app, until Ctrl-C.

python serving/run.py --base out/demo/training/run/t2v_192p_12fps/export
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

from waver_core.ray_environment import prepare_private_cluster

prepare_private_cluster()  # before Ray is imported

import errno
import logging
import os
import signal
import socket
import threading
from typing import Annotated

import ray
import typer
from ray import serve

from serving.app import APP, application
from serving.arguments import Arguments, settings_of
from serving.plan import facts
from waver_core.command_line import ConfigPath, Profiles, Sets, new_console
from waver_core.command_line import run as run_command_line
from waver_core.errors import UserError
from waver_core.ray_environment import init_options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    base: Annotated[str | None, typer.Option(help="Export of the base model (serving.cascade.base).")] = None,
    refiner: Annotated[str | None, typer.Option(help="Export of the refiner (serving.cascade.refiner).")] = None,
    config: ConfigPath = None,
    profile: Profiles = None,
    overrides: Sets = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this one need serving.http.api_keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve `POST /generate`, `/v1/videos` and the page at `/`."""
    names = ",".join(profile or ["embedded"])
    settings = settings_of(Arguments(config=config, profile=names, set=overrides or [], base=base, refiner=refiner))
    known = facts(settings)  # what is wrong with a checkpoint is said before Ray starts
    if not os.environ.get("RAY_ADDRESS"):
        _require_free(host, port)
    stop, starting = threading.Event(), True
    console = new_console()
    console.print(f"Starting Ray Serve with {known.base}" + (f" and {known.refiner}" if known.refiner else ""))
    ray.init(**init_options())
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which takes them for itself
            signal.signal(number, lambda *_: _interrupt() if starting else stop.set())
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.run(application(settings), name=APP, route_prefix="/")
        console.print(f"Ready: http://{host}:{port}/  (jobs and files in {settings.storage.folder}; Ctrl-C ends it)")
        starting = False
        stop.wait()
        console.print("Stopping")
    except KeyboardInterrupt:
        console.print("Stopping before everything was ready")
    finally:
        serve.shutdown()
        ray.shutdown()


def _require_free(host: str, port: int) -> None:
    """Ray's proxies share a port with whoever else would: two servers would answer every other request each."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a server has just left is free
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be listened at ({error.strerror})"
            raise UserError(f"{host}:{port} {reason}: end the server that is there, or choose another with --port") from None


def _interrupt() -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_command_line(app)
