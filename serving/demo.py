"""Entry script: start the server, make a video and a picture through HTTP with `waver`, say where they are, stop the server.

python serving/demo.py --base out/demo/training/run/t2v_192p_12fps/export --output out/demo/served
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file: the root, not this folder, holds the packages

import signal
import socket
import subprocess
import time
from typing import Annotated

import httpx2
import typer

from waver_core.command_line import new_console
from waver_core.command_line import run as run_command_line
from waver_core.errors import RunFailed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
WAVER = [sys.executable, "-c", "from serving.waver import main; main()"]  # what the console script `waver` does
PROMPTS = {
    "disc.mp4": ["red disc moving left"],  # the rewriter fills in what the model's captions say besides
    "unrefined.mp4": ["A medium-sized blue disc moves up over a white background.", "--no-refine"],
    "disc.png": ["A medium-sized green disc moves to the right over a beige background.", "--kind", "image"],
}


@app.command()
def main(
    base: Annotated[str, typer.Option(help="Export of the base model.")],
    output: Annotated[Path, typer.Option(help="Folder for the results, the jobs and the server's log.")],
    refiner: Annotated[str | None, typer.Option(help="Export of the refiner.")] = None,
    ready_within_s: Annotated[float, typer.Option(min=1, help="How long the server may take to start.")] = 180.0,
) -> None:
    """From nothing to an MP4 through HTTP."""
    output.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log_path = f"http://127.0.0.1:{port}", output / "server.log"
    command = [sys.executable, str(ROOT / "serving/run.py"), "--base", base, "--port", str(port)]
    command += ["--profile", "embedded", "--profile", "tiny", "--set", f"serving.storage.folder={output / 'jobs'}"]
    command += ["--refiner", refiner] if refiner else []
    console = new_console()
    console.print(f"Starting the server on {url}")
    begun = time.monotonic()
    with log_path.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # Ctrl-C is ours to pass on
    try:
        _wait(server, url, ready_within_s, log_path)
        console.print(f"Ready after {time.monotonic() - begun:.0f} s")
        for name, asked in PROMPTS.items():
            made = [*WAVER, "generate", *asked, "--seed", "7", "--server", url, "--output", str((output / name).absolute())]
            subprocess.run(made, check=True, cwd=ROOT)
    except subprocess.CalledProcessError as error:
        raise RunFailed(f"a request failed (see above); the server's log is {log_path}") from error
    finally:
        server.send_signal(signal.SIGINT)
        try:
            code = server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            code = server.wait()
    again = f"make serve BASE={base}" + (f" REFINER={refiner}" if refiner else "")
    console.print(f"The server has stopped (exit code {code}). Serve it again, page and all: {again}")


def _wait(server: subprocess.Popen[bytes], url: str, within_s: float, log: Path) -> None:
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up and server.poll() is None:
        try:
            if httpx2.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.25)
    last = " ".join(log.read_text().split()[-40:])
    raise RunFailed(f"the server did not become ready within {within_s:.0f} s; the end of {log}: {last}")


if __name__ == "__main__":
    run_command_line(app)
