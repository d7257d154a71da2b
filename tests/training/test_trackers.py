"""The file of metrics survives restarts and cuts; services get the same numbers, and a missing package is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.recipe import Recipe
from training.trackers import METRICS_NAME, JsonLines, read_metrics, trackers
from waver_core.errors import BackendUnavailable


def write(folder: Path, steps: range, start: int = 0, **numbers: float) -> None:
    file = JsonLines(folder, start)
    for step in steps:
        file.log(step, {"loss": 1 / step, **numbers})
    file.close()


def test_lines_are_visible_at_once(tmp_path: Path) -> None:
    file = JsonLines(tmp_path, 0)
    file.log(1, {"loss": 0.5, "bucket": "9x64x64"})  # type: ignore[dict-item]
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "bucket": "9x64x64"}]
    file.close()


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), attempt=1)
    write(tmp_path, range(6, 10), start=5, attempt=2)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["attempt"] for line in lines] == [1] * 5 + [2] * 4


def test_a_run_that_starts_anew_starts_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(1, 3))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_line_cut_off_in_writing_is_left_out_and_does_not_come_back(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / METRICS_NAME
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    write(tmp_path, range(4, 6), start=3)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == [METRICS_NAME]


def test_tensorboard_gets_the_numbers_and_a_resumed_run_replaces_later_ones(
    tmp_path: Path, encoding_recipe: Callable[..., Recipe]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = encoding_recipe("t2v_192p_12fps", "training.schedule.trackers=[tensorboard]")
    for start, steps, loss in ((0, range(1, 5), 1.0), (2, range(3, 6), 2.0)):
        found = trackers(recipe, tmp_path, start)
        for tracker in found:
            for step in steps:
                tracker.log(step, {"loss": loss})
            tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_the_file_comes_first_and_needs_no_service(tmp_path: Path, encoding_recipe: Callable[..., Recipe]) -> None:
    found = trackers(encoding_recipe("t2v_192p_12fps", "training.schedule.trackers=[]"), tmp_path / "run" / "stage", 0)
    assert [type(t) for t in found] == [JsonLines]
    found[0].close()


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    name: str, module: str, tmp_path: Path, encoding_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    recipe = encoding_recipe("t2v_192p_12fps", f"training.schedule.trackers=[{name}]")
    with pytest.raises(BackendUnavailable, match=f"the tracker {name} .*pip install {name}"):
        trackers(recipe, tmp_path, 0)


def test_wandb_and_mlflow_get_the_numbers_by_step(
    tmp_path: Path, encoding_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("finish"))
    wandb = SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    started = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    mlflow = SimpleNamespace(
        start_run=lambda **settings: calls.append(settings) or started,
        log_metrics=lambda numbers, step: calls.append((step, numbers)),
        end_run=lambda: calls.append("end"),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    recipe = encoding_recipe("t2v_192p_12fps", "training.schedule.trackers=[wandb, mlflow]")
    found = trackers(recipe, tmp_path, 0)
    for tracker in found:
        tracker.log(3, {"flow/t0.1": 0.5})
        tracker.close()
    assert calls[0]["name"] == calls[1]["run_name"] == recipe.stage
    assert calls[0]["resume"] == "allow" and calls[0]["config"]["stage"] == recipe.stage
    assert calls[2:] == [(3, {"flow/t0.1": 0.5}), "finish", (3, {"flow.t0.1": 0.5}), "end"]
    first = dict(calls[0])
    calls.clear()
    trackers(recipe, tmp_path, 3)
    assert calls[0]["id"] == first["id"] and calls[1]["run_id"] == "r1", "a restarted run goes on in the same curves"
