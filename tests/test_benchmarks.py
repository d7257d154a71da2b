"""Every benchmark runs through at a tiny size and writes a result file; the figures themselves are not judged here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import (
    adherence,
    backends,
    camera,
    captions,
    common,
    funnel,
    generation_step,
    labels,
    memory,
    preview,
    quality,
    shots,
)
from benchmarks import serving as serving_benchmark
from benchmarks.serving_process import ServerProcess
from curation.shots import Transition
from tests.serving.exports import write_export
from waver_core.dit import preset


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")

    def invoke(name: str, app: Typer, *options: str) -> dict[str, Any]:
        work = (
            []
            if app in (backends.app, labels.app, serving_benchmark.app, generation_step.app)
            else ["--work", str(tmp_path / "work")]
        )
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


class Unserved:
    """Stands for the server: the cascade in this process, with the times that a job would tell."""

    ready_s, spoilt = 1.0, b""

    def __init__(self, arguments: list[str]) -> None:
        settings = {word: arguments[k + 1] for k, word in enumerate(arguments) if word in ("--base", "--refiner")}
        overrides = [arguments[k + 1] for k, word in enumerate(arguments) if word == "--set"]
        known = serving_benchmark.Arguments(
            profile="embedded,tiny", base=settings["--base"], refiner=settings["--refiner"], set=overrides
        )
        self._local = serving_benchmark.Local(serving_benchmark.settings_of(known))
        self._jobs: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Unserved:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def cpu_s(self) -> float:
        return time.process_time()

    def generate(self, **asked: Any) -> tuple[bytes, str]:
        if "first_frame" in asked:  # a picture is for HTTP to read; here it is only seen to be one
            assert asked.pop("first_frame").startswith("iVBORw0KGgo")
        created = time.time()
        made = self._local.make(asked)
        job = {"created_at": created, "started_at": created + 0.001, "finished_at": time.time()}
        self._jobs[str(len(self._jobs))] = {**job, "stage_seconds": dict(made.stage_seconds)}
        return made.data + self.spoilt, str(len(self._jobs) - 1)

    def job(self, job_id: str) -> dict[str, Any]:
        return self._jobs[job_id]


@pytest.fixture
def exports(tmp_path: Path) -> list[str]:
    base = write_export(tmp_path / "base", "t2v_192p_12fps")
    refiner = write_export(tmp_path / "refiner", "refine_1080p", seed=1)
    return ["--base", base, "--refiner", refiner, "--set", "serving.cascade.steps=2", "--requests", "default"]


def test_serving(run: Any, exports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = adherence.prompts
    monkeypatch.setattr(serving_benchmark, "ServerProcess", Unserved)
    monkeypatch.setattr(serving_benchmark, "measure_idle", lambda *_: 0.1)
    monkeypatch.setattr(adherence, "prompts", lambda *a: prompts(*a)[:2])
    monkeypatch.setattr("benchmarks.adherence.prompt_for", lambda _: prompts()[0])
    sizes = ("--n", "2", "--clients", "1", "--videos", "2", "--rounds", "1", "--stills", "2")
    figures = run("serving", serving_benchmark.app, *exports, *sizes)
    found = figures["overhead"]["default"]
    assert found["runs"] == 2 and found["bytes"] > 500 and found["direct_stage_s"]["base"] > 0
    assert found["overhead_parts_s"]["until it is claimed"] == pytest.approx(0.001, rel=0.1)
    assert figures["throughput"]["1"]["videos"] == 2 and figures["throughput"]["1"]["videos_per_minute"] > 0
    told = figures["adherence"]
    assert [told[way]["samples"] for way in list(told)[:4]] == [2, 2, 2, 2] and told["images"]["images"] == 2
    assert told["first_frame"]["codec alone, 64x64"] > told["first_frame"]["base alone"]


def test_serving_must_not_change_a_byte(run: Any, exports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_benchmark, "ServerProcess", Unserved)
    monkeypatch.setattr(serving_benchmark, "measure_idle", lambda *_: 0.1)
    monkeypatch.setattr(Unserved, "spoilt", b"\0")
    with pytest.raises(AssertionError, match="2 different files of one request"):
        run("serving", serving_benchmark.app, *exports, "--parts", "overhead", "--n", "1")


def test_what_serving_adds_is_taken_apart() -> None:
    direct = [serving_benchmark.Direct(b"file", 1.0, 1.5, {"base": 0.7})] * 3
    parts = {
        "until the job is stored": 0.01,
        "until it is claimed": 0.02,
        "between the stages": 0.03,
        "until the file is here": 0.04,
    }
    remote = [serving_benchmark.Served(b"file", 1.2, 2.0, parts, {"base": 0.8})] * 3
    found = serving_benchmark._compared(direct, remote, {})
    assert found["ratio"] == pytest.approx(1.2) and found["job_only_ratio"] == pytest.approx(1.15)
    assert found["within_aim_from_s"] == pytest.approx(0.2 / 0.03)
    assert found["overhead_parts_s"]["in base"] == pytest.approx(0.1) and found["overhead_parts_s"]["in refine"] == 0


@pytest.mark.ray
@pytest.mark.slow
def test_serving_for_real(run: Any, exports: list[str]) -> None:
    started: list[ServerProcess] = []
    enter = ServerProcess.__enter__

    def entered(self: ServerProcess) -> ServerProcess:
        started.append(self)
        return enter(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerProcess, "__enter__", entered)
        patch.setattr(serving_benchmark, "measure_idle", lambda server, _: server.cpu_s())
        figures = run("serving", serving_benchmark.app, *exports, "--parts", "overhead,throughput", "--n", "1", "--videos", "2")
    found = figures["overhead"]["default"]
    assert found["same_bytes"] and found["served_s"] > 0 and figures["idle_cores"] > 0
    assert sum(found["overhead_parts_s"].values()) < found["served_s"]
    (server,) = started
    assert not server.folder.exists() and not [p for p in server.family() if p.status() != psutil.STATUS_ZOMBIE]


def test_generation_step(run: Any) -> None:
    figures = run("generation_step", generation_step.app, "--quick", "--repeats", "1", "--whole", "480p", "--device", "cpu")
    rows = figures["rows"]
    assert [(r["case"], r["blocks"], r["error"]) for r in rows] == [
        *((case, [1, 2], None) for case in ("720p", "480p", "refiner", "1080p")),
        ("480p", [16, 40], None),
    ]
    assert all(r["step_s"] > 0 and r["whole_step_s"] >= r["step_s"] for r in rows)
    step_s = {r["case"]: r["whole_step_s"] for r in rows[:4]}
    direct, cascade = 40 * step_s["1080p"], 40 * step_s["720p"] + 20 * step_s["refiner"]
    way = figures["measured"]["eager"]["720p + refiner"]
    assert way["total"] == pytest.approx(cascade, rel=1e-2) and way["saved"] == pytest.approx(1 - cascade / direct, abs=1e-2)


def test_generation_step_counts_the_whole_model(run: Any) -> None:
    figures = run("generation_step_predicted", generation_step.app, "--predict")["predicted"]
    tokens, width = 30 * 68 * 120 + 512, 3072  # 117 frames of 1080p, and text
    assert figures["step_tflop"]["1080p"] == pytest.approx(
        2 * 56 * (24 * tokens * width**2 + 4 * width * tokens**2) / 1e12, rel=0.01
    )
    saved = {way: told["saved"] for way, told in figures["ways"].items()}
    assert saved == pytest.approx({"1080p directly": 0, "720p + refiner": 0.64, "480p + refiner": 0.80}, abs=0.005)


def test_some_blocks_stand_for_all_in_operations() -> None:
    whole = preset("waver_12b")
    case = generation_step.cases_of(5, 24, 256, 2, quick=False)["refiner"]
    some = generation_step.some_blocks(whole, 4, 10)
    assert case.flops(some).attention * 4 == case.flops(whole).attention, "windows have their true share"


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
