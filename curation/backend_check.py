"""What the backends of a configuration need, and whether each of them answers: asked before a run, not in hour three.

Every backend is loaded in a process other than this one, so that one which crashes, hangs or fills the memory hides none of
the others, and what it held is free again. It answers as it would in a run: the stage's own hook, on one rendered clip,
with the frames that the stage asks for; the stage's other backends are left out meanwhile, or are those of the default.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pyarrow as pa

from curation.scores_pass import sample_clips
from curation.shots_pass import small_frame
from curation.stage import BackendUse, Row, SourceFacts, Stage, StageSet, StreamFrame, load_stages
from waver_core.checkpoints import Checkpoint
from waver_core.config import Config
from waver_core.errors import UserError
from waver_core.fetching import state_of
from waver_core.isolation import isolated
from waver_core.manifest import CLIP_COLUMNS, rows_to_table
from waver_core.synthetic import single_shot, write_video
from waver_core.video import open_video, quarter_turns

CLIP_S = 2.5
_FAREWELL_S = 5.0
_TRUTH: Row = {
    "kind": "video",
    "short_side_px": 360,
    "width_px": 640,
    "height_px": 360,
    "fps": 24.0,
    "motion_camera": "static",
    "caption": "A red disc moves to the right in front of a textured background.",
    "caption_short": "A red disc moves to the right.",
}
"""What earlier stages would have written of the rendered clip, for stages that read it."""


@dataclass(frozen=True)
class Need:
    """A backend of a stage, and what must be there before it can be loaded."""

    stage: str
    position: int
    """Which of the stage's backends it is."""
    use: BackendUse
    checkpoints: tuple[Checkpoint, ...] = ()
    packages_missing: tuple[str, ...] = ()
    extra: str = "models"
    """The extra of this project that installs the packages."""
    in_executor: bool = False
    """Whether vLLM serves it inside the run, where nothing but the run can ask it."""
    refused: str = ""
    """Why it cannot even be built."""

    @property
    def problems(self) -> list[str]:
        """Everything that is known to be wrong before loading it."""
        found = [self.refused] if self.refused else []
        if self.packages_missing:
            found.append(f"packages missing: {', '.join(self.packages_missing)} (extra '{self.extra}')")
        states = {c.repo: state_of(c) for c in self.checkpoints}
        return found + [f"checkpoint {state}: {repo}" for repo, state in states.items() if state != "present"]


class Verdict(NamedTuple):
    """How one backend did. Without problems it answered, or is one that only the run can ask."""

    need: Need
    problems: list[str]
    answer: str = ""
    seconds: float = 0.0
    memory_mb: float = 0.0
    """Most that its process held."""
    gpu_mb: float = 0.0


def needs_of(config: Config, stages: StageSet) -> list[Need]:
    """The backends of all stages, in order. Nothing is imported or loaded for it."""
    return [_need(stage.name, k, use, config) for stage in stages.stages for k, use in enumerate(stage.backends())]


def _need(stage: str, position: int, use: BackendUse, config: Config) -> Need:
    need = Need(stage, position, use)
    try:
        backend = use.create()
        checkpoints = tuple(backend.checkpoints()) if hasattr(backend, "checkpoints") else ()
    except UserError as error:
        return replace(need, refused=str(error))
    in_executor = getattr(backend, "engine_name", "") == "vllm" or config.funnel.resources(stage).llm is not None
    packages = [*getattr(backend, "packages", ()), *(["vllm"] if in_executor else [])]
    missing = tuple(p for p in packages if not _installed(p))
    extra = "vllm" if missing == ("vllm",) else getattr(backend, "extra", need.extra)
    return replace(need, checkpoints=checkpoints, packages_missing=missing, extra=extra, in_executor=in_executor)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check(config: Config, needs: Sequence[Need], timeout_s: float, report: Callable[[Verdict], None]) -> list[Verdict]:
    """Verdicts in the order of `needs`: whatever has all it needs is loaded and answers; `report` is told as each does."""
    able = [n for n in needs if not n.problems and not n.in_executor]
    verdicts = [Verdict(n, n.problems, "vLLM serves it, inside the run only") for n in needs if n not in able]
    # Models get a process each. What needs no weights shares one: starting it takes longer than its answer.
    groups = [[n] for n in able if n.checkpoints]
    light = [n for n in able if not n.checkpoints]
    with tempfile.TemporaryDirectory() as folder:
        clip = str(Path(folder, "clip.mp4"))
        write_video(single_shot(7, duration_s=CLIP_S), clip)
        for group in [light, *groups]:
            for verdict in _asked(config, group, clip, str(Path(folder, "log")), timeout_s):
                verdicts.append(verdict)
                report(verdict)
    order = {id(need): k for k, need in enumerate(needs)}
    return sorted(verdicts, key=lambda v: order[id(v.need)])


def _asked(config: Config, needs: Sequence[Need], clip: str, log: str, timeout_s: float) -> Iterator[Verdict]:
    """Verdicts of backends that share a process; after one that took it down, the rest get a new one."""
    spawn = multiprocessing.get_context("spawn")
    waiting = list(needs)
    while waiting:
        receiver, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_answer_all, args=(sender, config, waiting, clip, log), daemon=True)
        process.start()
        sender.close()
        alive = True
        while waiting and alive:
            need = waiting.pop(0)
            try:
                if receiver.poll(timeout_s):
                    yield Verdict(need, **receiver.recv())
                else:
                    alive = False
                    yield Verdict(need, [f"no answer within {timeout_s:g} s (--timeout)"])
            except EOFError:
                alive = False
                process.join()
                yield Verdict(need, [_how_it_died(process.exitcode, log)])
        process.join(_FAREWELL_S if alive else 0)
        process.kill()  # libraries with threads of their own may not find the end


def _how_it_died(code: int | None, log: str) -> str:
    if code == -9:
        return "its process was killed, as the system does when memory runs out"
    there = Path(log)  # what its libraries printed, unless it died before it could say anything
    lines = there.read_text(errors="replace").strip().splitlines() if there.exists() else []
    return f"its process died with code {code}" + (f": {lines[-1]}" if lines else "")


def _answer_all(sender: Connection, config: Config, needs: Sequence[Need], clip: str, log: str) -> None:
    """The other process: one backend after another answers, what libraries print goes to a file."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    stages = load_stages(config)
    for need in needs:
        _forget_peak()
        started = time.perf_counter()
        problems, answer = [], ""
        try:
            stage = alone(stages.named(need.stage), need.use)
            answer = _summary(stage, ask(stage, clip, stages.schema))
        except Exception as error:  # whatever a library raises is this backend's problem, and no other's
            first = next(iter(str(error).strip().splitlines()), "")
            problems.append(first if isinstance(error, UserError) else f"{type(error).__name__}: {first}")
        seconds = time.perf_counter() - started
        sender.send({"problems": problems, "answer": answer, "seconds": seconds, "memory_mb": _peak_mb(), "gpu_mb": _gpu_mb()})


def alone(stage: Stage, use: BackendUse) -> Stage:
    """The stage with just this one of its backends: others are left out where its options allow that, else the default ones.

    It goes by the names of options, `<x>backend` and `<x>backend_options`; a stage that names them otherwise keeps them all.
    """
    changed: dict[str, Any] = {}
    fields = type(stage.options).model_fields
    for name in [n for n in fields if n.endswith("backend")]:
        chosen = (getattr(stage.options, name), getattr(stage.options, f"{name}_options", {}))
        if chosen != (use.name, use.options):
            optional = type(None) in get_args(fields[name].annotation)
            changed[name] = None if optional else fields[name].get_default()
            changed |= {n: {} for n in fields if n == f"{name}_options"}
    return type(stage)(stage.options.model_copy(update=changed))


def ask(stage: Stage, clip: str, schema: pa.Schema) -> Row:
    """The columns that a stage's hooks find for the clip, of the types that it declares. Raises what they raise."""
    row: Row = {c.name: None for c in CLIP_COLUMNS} | dict.fromkeys(stage.reads)
    row |= {"clip_id": "check", "source_id": "check", "source_uri": clip, "start_s": 0.0, "start_frame": 0} | _TRUTH
    row |= {"end_s": CLIP_S, "duration_s": CLIP_S, "end_frame": round(CLIP_S * _TRUTH["fps"])}
    found: Row = {}
    if "stream" in stage.hooks:
        found |= _watched(stage, clip, row)
    if "clip" in stage.hooks:
        with open_video(clip) as video:
            media = list(sample_clips(video, [row | found], list(stage.requests())))
        found |= _only(isolated(stage.score_many, media))
    if "text" in stage.hooks:
        found |= _only(stage.annotate([row]))
    written = rows_to_table([found], schema).to_pylist()[0]
    answer = {c.name: written[c.name] for c in stage.columns if written[c.name] is not None}
    if not answer:
        raise ValueError("it answered, but gave no value for any column")
    if wrong := [name for name, value in answer.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise ValueError(f"it gave numbers that are none for {', '.join(wrong)}")
    return answer


def _watched(stage: Stage, clip: str, row: Row) -> Row:
    """What the stage's watcher says after seeing every frame, as in the first pass."""
    with open_video(clip, fast=True) as video:
        watcher: Any = None
        for index, frame in enumerate(video.frames()):
            watcher = watcher or stage.watch(SourceFacts(video.info, "video", quarter_turns(frame.picture)))
            watcher.add(StreamFrame(index, frame.time_s, small_frame(frame.picture), frame.picture, None, frame.damaged))
    if hasattr(watcher, "clips"):  # the stage that finds the clips, and need not be told of any
        first: Row = watcher.clips()[0]
        return first
    described: Row = watcher.describe([row])[0]
    return described


def _only(results: Sequence[Row | Exception]) -> Row:
    [found] = results
    if isinstance(found, Exception):
        raise found
    return found


def _summary(stage: Stage, answer: Row) -> str:
    """The first score of the answer, or else its first column."""
    name = next((c.name for c in stage.columns if c.score and c.name in answer), next(iter(answer)))
    value = answer[name]
    text = f"{value:.3g}" if isinstance(value, float) else f"{len(value)} values" if isinstance(value, list) else str(value)
    return f"{name} = {text if len(text) <= 60 else text[:57] + '...'}"


def _forget_peak() -> None:
    """Begin to count the most memory held anew, where the kernel (Linux) allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    """Most memory that this process has held, in 10^6 bytes."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _gpu_mb() -> float:
    """Most memory of the GPU that torch has held here, if the backend brought torch at all."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0.0
    return float(torch.cuda.max_memory_allocated()) / 1e6
