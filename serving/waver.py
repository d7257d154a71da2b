"""`waver`: videos and images from a running server.

waver generate "A red disc moves to the left." -o out.mp4
waver generate "It begins to rain." --image first.png --seconds 5 --seed 7 -o rain.mp4
waver jobs; waver cancel ID; waver download ID -o out.mp4

A key is taken from WAVER_API_KEY, the server's address from --server or WAVER_SERVER.
"""

from __future__ import annotations

import json
import math
import os
import time
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from serving.client import Client, Job, Refused, checked, clean
from serving.jobs import ENDED
from waver_core.command_line import new_console
from waver_core.command_line import run as run_command_line
from waver_core.errors import RunFailed, UserError
from waver_core.telemetry import duration_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
INTERRUPTED = 130
_STOP_S = 10.0
"""How long a cancellation is tried after Ctrl-C."""


class Kind(StrEnum):
    """What is made."""

    video = "video"
    image = "image"


class Priority(StrEnum):
    """Higher ones are begun first."""

    low = "low"
    normal = "normal"
    high = "high"


Server = Annotated[str, typer.Option("--server", envvar="WAVER_SERVER", help="Address of the server.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write (default: the job's id).")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait; the job goes on after that.")]
LOCAL = "http://127.0.0.1:8000"


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    output: Output = None,
    server: Server = LOCAL,
    image: Annotated[Path | None, typer.Option("--image", help="Picture that the video begins with.")] = None,
    last_image: Annotated[Path | None, typer.Option("--last-image", help="Picture that it ends with.")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Size of the result in px.")] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Length of a video.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Makes the same again (default: drawn).")] = None,
    style: Annotated[str | None, typer.Option("--style", help="A style the model knows, such as painting.")] = None,
    kind: Annotated[Kind, typer.Option("--kind", help="A video (MP4) or an image (PNG).")] = Kind.video,
    no_rewrite: Annotated[bool, typer.Option("--no-rewrite", help="Leave the prompt as it is.")] = False,
    no_refine: Annotated[bool, typer.Option("--no-refine", help="The base model's result will do.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps of the base model.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="How strongly the prompt is followed.")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="What to keep away from.")] = None,
    priority: Annotated[Priority, typer.Option("--priority", help="Higher ones are begun first.")] = Priority.normal,
    preview: Annotated[
        Path | None, typer.Option("--preview", help="Write the base model's result here, as soon as it is there.")
    ] = None,
    timeout: Timeout = 3600.0,
) -> None:
    """Make a video or an image, watch it, and write the file. Ctrl-C cancels the job."""
    for path in (output, preview):
        _check_target(path, kind)
    for option, number in (("--seconds", seconds), ("--guidance", guidance)):
        if number is not None and not math.isfinite(number):
            raise UserError(f"{option} {number}: give a finite number")
    fields = {
        "prompt": prompt,
        "kind": kind.value,
        "size": size,
        "seconds": seconds,
        "seed": seed,
        "style": style,
        "rewrite": False if no_rewrite else None,
        "refine": False if no_refine else None,
        "steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative,
        "priority": priority.value if priority is not Priority.normal else None,
    }
    pictures = {name: path for name, path in (("first_frame", image), ("last_frame", last_image)) if path is not None}
    files = {name: (path.name, _read(path)) for name, path in pictures.items()}
    job: Job | None = None
    with Display() as display, _client(server, timeout, display) as client:
        try:
            job = client.submit({name: value for name, value in fields.items() if value is not None}, files)
            display.note(f"{job['id']}, seed {job['resolved'].get('seed')}")
            job = _followed(client, job, display, preview)
            target = _fetch(client, job, output)
        except KeyboardInterrupt:
            display.close()
            _stop(server, job)
            raise typer.Exit(INTERRUPTED) from None
    _tell(job, target, preview)


@app.command()
def jobs(
    server: Server = LOCAL,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="How many, newest first.")] = 20,
    state: Annotated[
        str | None, typer.Option("--state", help="queued, in_progress, completed, failed, cancelled or expired.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One job a line, as the API gives it.")] = False,
) -> None:
    """List the newest jobs."""
    with _client(server, 60.0) as client:
        found = client.jobs(limit, state)
    if as_json:
        for job in found:
            print(json.dumps(job))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "state", "done", "size", "seed", "age", "prompt"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", justify="right" if name in ("done", "seed", "age") else "left")
    for job in found:
        told = job["resolved"]
        row = (job["id"], _state(job), f"{100 * job['progress']:.0f} %", _size(told), str(told.get("seed", "")))
        age = duration_text(max(0.0, time.time() - job["created_at"]))
        table.add_row(*(Text(str(cell)) for cell in (*row, age, clean(job["request"]["prompt"])[:80])))
    new_console().print(table if found else "no jobs yet: waver generate makes one")


@app.command()
def cancel(job_id: JobId, server: Server = LOCAL) -> None:
    """Cancel a job that waits or is in progress."""
    with _client(server, 60.0) as client:
        before = client.job(job_id)
        if before["state"] in ENDED:
            raise UserError(f"{job_id} is {before['state']} already: there is nothing to cancel")
        print(_cancelled(client.cancel(job_id)))


@app.command()
def download(
    job_id: JobId,
    output: Output = None,
    server: Server = LOCAL,
    preview: Annotated[bool, typer.Option("--preview", help="The base model's result instead of the refined one.")] = False,
    timeout: Timeout = 3600.0,
) -> None:
    """Write a job's result; waits for it if it is still being made. Ctrl-C leaves the job alone."""
    with Display() as display, _client(server, timeout, display) as client:
        try:
            job = client.job(checked(job_id))
            _check_target(output, Kind(job["request"].get("kind", "video")))
            if not (preview and job["links"]["preview"]):
                job = _followed(client, job, display, None)
            target = _fetch(client, job, output, "preview" if preview else "video")
        except KeyboardInterrupt:
            display.close()
            print(f"stopped waiting; {job_id} goes on")
            raise typer.Exit(INTERRUPTED) from None
    _tell(job, target, None)


class Display:
    """Progress on stderr: a bar on a terminal, a line a stage in a log."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(40),
            TaskProgressColumn(),
            TextColumn("{task.fields[step]}"),
        )
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
        self._task = self._progress.add_task("sending", total=1.0, step="")
        self._said = ""

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._console.is_terminal:
            self._progress.stop()

    def note(self, text: str) -> None:
        """A line beside the bar."""
        self._console.print(Text(text))

    def show(self, job: Job) -> None:
        """Where the job stands."""
        words, step = _standing(job)
        self._progress.update(self._task, completed=job["progress"], description=words, step=step)
        if not self._console.is_terminal and words != self._said:
            self._said = words
            self.note(f"{100 * job['progress']:3.0f} %  {words}")


def _standing(job: Job) -> tuple[str, str]:
    if job["state"] == "queued":
        ahead = job.get("queue_position")
        return (f"queued, {ahead} before it" if ahead else "queued, next"), ""
    if job["state"] != "in_progress":
        return job["state"], ""
    words = "cancelling" if job["cancel_requested"] else str(job["stage"] or "starting")
    return words, f"step {job['step']} of {job['steps']}" if job["steps"] > 1 else ""


def _followed(client: Client, job: Job, display: Display, preview: Path | None) -> Job:
    """Until it has ended well; raises `RunFailed` or `Refused` otherwise."""
    saved: set[int] = set()

    def told(now: Job) -> None:
        display.show(now)
        if preview is None or now["links"]["preview"] is None or now["attempt"] in saved:
            return
        try:
            client.download(now["links"]["preview"], preview)
        except Refused:
            return  # begun anew meanwhile: the next one comes
        saved.add(now["attempt"])
        display.note(f"preview: {preview}")

    told(job)
    if job["state"] not in ENDED:
        job = client.follow(job["id"], told)
    if job["state"] == "failed":
        error = job["error"] or {}
        raise RunFailed(f"{job['id']} failed ({clean(str(error.get('code')))}): {clean(str(error.get('message')))}")
    if job["state"] == "cancelled":
        raise RunFailed(f"{job['id']} was cancelled by someone")
    if job["state"] == "expired":
        raise UserError(f"the result of {job['id']} was deleted; make it again with the same seed, {job['resolved'].get('seed')}")
    return job


def _fetch(client: Client, job: Job, output: Path | None, which: str = "video") -> Path:
    suffix = ".png" if job["request"].get("kind") == "image" else ".mp4"
    target = output if output is not None else Path(f"{job['id']}{'-preview' if which == 'preview' else ''}{suffix}")
    path = job["links"][which]
    if path is None:
        raise UserError(f"{job['id']} has no {which}: it was made without the refiner, or is not made yet")
    client.download(path, target)
    return target


def _tell(job: Job, target: Path, preview: Path | None) -> None:
    told = job["resolved"]
    console = new_console()
    took = (job["finished_at"] or time.time()) - (job["started_at"] or job["created_at"])
    facts = [
        _size(told),
        f"{told['frames']} frames" if told.get("frames", 1) > 1 else "",
        f"seed {told.get('seed')}",
        duration_text(took),
    ]
    console.print(Text(f"{target}  ({', '.join(filter(None, facts))})"), soft_wrap=True)
    if told.get("rewrite_fell_back"):
        console.print(Text(f"the prompt was not rewritten: {clean(told['rewrite_fell_back'])}"), soft_wrap=True)
    elif told.get("prompt", job["request"]["prompt"]) != job["request"]["prompt"]:
        console.print(Text(f"rewritten: {clean(told['prompt'])}"), soft_wrap=True)
    if preview is not None and job["links"]["preview"] is None:
        console.print(Text(f"{preview} was not written: there is no refiner, so the result is all there is"), soft_wrap=True)


def _stop(server: str, job: Job | None) -> None:
    """After Ctrl-C: end the job, and say what became of it."""
    if job is None:
        print("interrupted before the server had answered; if it took the job, `waver jobs` shows it")
        return
    try:
        with _client(server, _STOP_S) as client:
            print(_cancelled(client.cancel(job["id"])))
    except (UserError, KeyboardInterrupt) as error:
        print(f"interrupted, and {job['id']} could not be cancelled ({error}); try `waver cancel {job['id']}`")


def _cancelled(job: Job) -> str:
    if job["state"] == "completed":
        return f"{job['id']} was completed already: `waver download {job['id']}` fetches it"
    return (
        f"{job['id']} is cancelled"
        if job["state"] == "cancelled"
        else f"{job['id']} is being cancelled: it stops after this step"
    )


def _client(server: str, timeout_s: float, display: Display | None = None) -> Client:
    return Client(
        server, os.environ.get("WAVER_API_KEY", ""), timeout_s=timeout_s, say=display.note if display else lambda _: None
    )


def _check_target(path: Path | None, kind: Kind) -> None:
    """Raises `UserError` before anything is computed for a file that cannot be written."""
    if path is None:
        return
    suffix = ".png" if kind is Kind.image else ".mp4"
    if path.suffix.lower() != suffix:
        raise UserError(
            f"{path}: the result is {'a PNG' if kind is Kind.image else 'an MP4'}, so give a name that ends in {suffix}"
        )
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: give another file")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a PNG, JPEG or WebP picture") from None


def _state(job: Job) -> str:
    if job["state"] != "in_progress":
        return str(job["state"])
    return "cancelling" if job["cancel_requested"] else str(job["stage"] or "starting")


def _size(resolved: dict[str, Any]) -> str:
    return f"{resolved['width_px']}x{resolved['height_px']}" if "width_px" in resolved else ""


def main() -> None:
    """The console script `waver`."""
    run_command_line(app)
