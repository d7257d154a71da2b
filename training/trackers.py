"""Where losses go: always `metrics.jsonl`, and TensorBoard, Weights & Biases or MLflow by `schedule.trackers`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from training.recipe import Recipe
from waver_core.config import digest_of
from waver_core.errors import BackendUnavailable

METRICS_NAME = "metrics.jsonl"


class Tracker(Protocol):
    """Takes numbers by name and step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record numbers of one step."""

    def close(self) -> None:
        """Write what is left."""


class JsonLines:
    """One object a line. A run that goes on from step k drops what an earlier attempt wrote after it: the curve has every step
    once."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._path = folder / METRICS_NAME
        kept = [line for line in read_metrics(folder) if line["step"] <= start_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._path)
        self._file = self._path.open("a")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append a line, visible to readers at once."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, in order; a last line that was cut off in writing is left out."""
    path = Path(folder) / METRICS_NAME
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BackendUnavailable(f"the tracker tensorboard needs its package ({error}): pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, recipe: Recipe) -> None:
        try:
            import wandb
        except ImportError as error:
            raise BackendUnavailable(f"the tracker wandb needs its package ({error}): pip install wandb") from error
        # The id follows from the folder, so that a restarted run goes on in the same chart.
        self._run = wandb.init(
            project="openwaver",
            id=digest_of(str(folder)),
            name=recipe.stage,
            dir=str(folder),
            resume="allow",
            config=recipe.model_dump(),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, recipe: Recipe) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise BackendUnavailable(f"the tracker mlflow needs its package ({error}): pip install mlflow") from error
        self._mlflow = mlflow
        known = folder / "mlflow-run-id"  # so that a restarted run goes on in the same curve
        before = known.read_text() if known.exists() else None
        run = mlflow.start_run(run_id=before, run_name=None if before else recipe.stage, tags={"recipe": recipe.digest})
        known.write_text(run.info.run_id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({name.replace("/", "."): value for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def trackers(recipe: Recipe, folder: Path, start_step: int) -> Sequence[Tracker]:
    """Everything that is told of this run. Raises `BackendUnavailable` where a package is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Tracker] = [JsonLines(folder, start_step)]
    for name in recipe.schedule.trackers:
        if name == "tensorboard":
            found.append(_TensorBoard(folder, start_step))
        elif name == "wandb":
            found.append(_Wandb(folder, recipe))
        else:
            found.append(_MLflow(folder, recipe))
    return found
