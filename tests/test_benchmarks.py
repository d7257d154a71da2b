"""Every benchmark runs through at a tiny size and writes a result file; the figures themselves are not judged here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import adherence, backends, camera, captions, common, funnel, labels, memory, preview, quality, shots
from curation.shots import Transition


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")

    def invoke(name: str, app: Typer, *options: str) -> dict[str, Any]:
        work = [] if app in (backends.app, labels.app) else ["--work", str(tmp_path / "work")]
        result = CliRunner().invoke(app, [*options, *work, "--save"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        saved = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert saved["benchmark"] == name
        assert saved["machine"]["cores"] >= 1
        assert set(saved["versions"]) >= {"av", "numpy", "ray", "openwaver"}
        figures: dict[str, Any] = saved["figures"]
        return figures

    return invoke


def test_shots(run: Any) -> None:
    figures = run("shots", shots.app, "--videos", "1", "--shots", "3", "--jobs", "1", "--verbose")
    assert figures["openwaver"]["cut"]["true"] + figures["openwaver"]["gradual"]["true"] == 2
    assert figures["frames"] > 0


def test_camera(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, videos = camera.cases, camera.overlay_videos
    monkeypatch.setattr(camera, "cases", lambda *a: [cases(*a)[i] for i in (1, 3)])  # static with a shape, a pan without
    monkeypatch.setattr(camera, "overlay_videos", lambda *a: videos(*a)[1:2])
    figures = run("camera", camera.app, "--seeds", "1", "--overlay-seeds", "1", "--jobs", "1", "--verbose")
    assert figures["camera"]["clips"] == 2
    assert figures["overlays"]["watermark"]["true"] == figures["overlays"]["clips"] > 0


def test_funnel(run: Any) -> None:
    figures = run("funnel", funnel.app, "--minutes", "0.02", "--jobs", "1", "--serial", "--no-memory")
    assert figures["video_s"] > 0
    assert figures["with_text"]["stages_s"]["overlay"] > figures["without_text"]["stages_s"]["overlay"]
    for name in ("with_text", "without_text"):
        assert figures[name]["clips"] > figures[name]["clips_not_fully_scored"] == 0


def test_preview(run: Any) -> None:
    figures = run("preview", preview.app, "--rows", "3000", "--shards", "2")
    assert 3000 > figures["kept"]["192p"] > 0
    assert figures["preview"]["peak_rss_mb"] > 50


def test_memory(run: Any) -> None:
    figures = run("memory", memory.app, "--minutes", "0.1", "--segment-s", "3", "--height", "96", "--jobs", "1")
    assert figures["shots"]["frames"] == pytest.approx(144, rel=0.3)
    assert figures["scores"]["clips"] >= 1
    assert figures["scores"]["peak_uss_mb"] > 30


def test_backends(run: Any) -> None:
    figures = run("backends_embedded", backends.app, "--clips", "2", "--batch", "2")
    assert {row["stage"] for row in figures["backends"]} == {"aesthetic", "overlay", "motion", "quality", "caption", "label"}
    assert all(row["ms_per_clip"] > 0 for row in figures["backends"])


@pytest.mark.ray
def test_labels(run: Any) -> None:
    figures = run("labels", labels.app, "--captions", "6000", "--single", "500")
    assert figures["ray_data"]["captions"] == 6000 and figures["ray_data"]["mean_weight"] == pytest.approx(1.0, rel=1e-3)
    assert 0.6 < figures["one_process"]["labelled_share"] < 0.9


def test_quality(run: Any) -> None:
    figures = run("quality", quality.app, "--per-issue", "1", "--jobs", "1")
    assert figures["mean_f1"] > 0.5


def test_captions(run: Any) -> None:
    figures = run("captions", captions.app, "--clips", "4", "--tiny", "2", "--jobs", "1")
    assert figures["clips"] == 4 and figures["tiny_clips"] == 2


def test_adherence(run: Any, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    figures = run("adherence", adherence.app, "--clips", "4", "--jobs", "1", "--verbose", "--sheet", str(sheet))
    assert figures["rendered"]["both"] == figures["decoded"]["both"] == 1.0
    assert figures["rendered"]["outline_sure"] == 1.0
    assert sheet.stat().st_size > 0


def test_shots_are_judged_strictly() -> None:
    case = shots.Case("case", "", [Transition("cut", 10, 10), Transition("dissolve", 40, 60)], ["", ""])
    tally = shots.Tally()
    tally.add(case, [Transition("cut", 11, 11), Transition("dissolve", 45, 62), Transition("cut", 90, 90)])
    figures = tally.figures()
    assert figures["cut"] | {"f1": 0} == {"true": 1, "found": 1, "false": 1, "precision": 0.5, "recall": 1.0, "f1": 0}
    assert figures["gradual"]["found"] == 1
    assert figures["gradual"]["start_error_frames"] == 5
    late = shots.Tally()
    late.add(case, [Transition("cut", 12, 12), Transition("cut", 50, 50)])
    assert (late.figures()["cut"]["found"], late.figures()["gradual"]["found"], late.false["cut"]) == (0, 0, 2)
    mild = shots.Tally()
    mild.add(case, [Transition("cut", 10, 10), Transition("cut", 50, 50)], instants=True)
    assert (mild.figures()["cut"]["found"], mild.figures()["gradual"]["found"], sum(mild.false.values())) == (1, 1, 0)
