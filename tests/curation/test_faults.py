"""Files that are broken in every way a collection holds: each is quarantined with a reason or handled right; the run goes on."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import curation.shots_pass
from curation.shots_pass import ShotsPass
from curation.workfolder import WorkFolder
from waver_core.config import load_config
from waver_core.errors import BackendUnavailable, RunFailed
from waver_core.synthetic import Background, single_shot, write_video


def _good(path: Path, seed: int = 5, **options: Any) -> Path:
    size = {"width_px": 320, "height_px": 180, "duration_s": 2.5, "background": Background("terrain"), **options}
    write_video(single_shot(seed, camera="pan_left", colour="red", shape="disc", direction="right", **size), path)
    return path


def _audio_only(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)


def _variable_rate(path: Path, good: Path) -> None:
    """The frames of `good` at 24 and, for the middle second, at 12 a second."""
    with av.open(str(good)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 48)
        at = 0
        for index, frame in enumerate(source.decode(video=0)):
            frame.pts, frame.time_base, frame.pict_type = at, Fraction(1, 48), 0
            out.mux(stream.encode(frame))
            at += 4 if 20 <= index < 32 else 2
        out.mux(stream.encode(None))


def _delayed(path: Path, good: Path) -> None:
    with av.open(str(good)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.pts += int(3 / packet.time_base)
                packet.dts += int(3 / packet.time_base)
                packet.stream = stream
                out.mux(packet)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    good = _good(folder / "good.mp4")
    data = good.read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "cut_off.mp4").write_bytes(data[: int(len(data) * 0.85)])
    middle = bytearray(data)
    middle[len(data) // 3 : len(data) // 3 + len(data) // 4] = os.urandom(len(data) // 4)
    (folder / "noise_inside.mp4").write_bytes(bytes(middle))
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:2,\n{good}\n#EXT-X-ENDLIST\n")
    (folder / "notes.txt").write_text("read me")
    _audio_only(folder / "audio.mp4")
    _variable_rate(folder / "variable.mp4", _good(folder / "other.mp4", seed=11))
    _delayed(folder / "delayed.mp4", _good(folder / "other.mp4", seed=6))
    (folder / "other.mp4").unlink()
    return folder


@pytest.fixture(scope="module")
def outcome(broken: Path, tmp_path_factory: pytest.TempPathFactory, curate: Any) -> dict[str, dict[str, Any]]:
    result = curate(broken, tmp_path_factory.mktemp("outcome"), "funnel.failure_budget.max_share=1")
    clips = result.clips.to_pylist()
    return {Path(s["uri"]).name: {**s, "clips": [c for c in clips if c["source_uri"] == s["uri"]]} for s in result.sources}


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("empty.mp4", "quarantined", "empty"),
        ("text.mp4", "quarantined", "not_media"),
        ("cut_off.mp4", "ok", None),
        ("noise_inside.mp4", "quarantined", "damaged"),
        ("playlist.mp4", "quarantined", "not_media"),
        ("notes.txt", "ignored", "not_media"),
        ("audio.mp4", "quarantined", "no_video_stream"),
        ("good.mp4", "ok", None),
    ],
)
def test_each_file_gets_its_verdict(outcome: dict[str, Any], name: str, status: str, reason: str | None) -> None:
    assert (outcome[name]["status"], outcome[name]["reason"]) == (status, reason), outcome[name]["error"]
    if status == "quarantined":
        assert outcome[name]["error"] and "\n" not in outcome[name]["error"] and not outcome[name]["clips"]


def test_a_truncated_file_keeps_what_is_left_and_says_so(outcome: dict[str, Any]) -> None:
    assert "breaks off" in outcome["cut_off.mp4"]["note"]
    assert 0 < outcome["cut_off.mp4"]["n_frames"] < outcome["good.mp4"]["n_frames"]


def test_a_variable_frame_rate_is_seen_and_timed_by_the_frames_own_clock(outcome: dict[str, Any]) -> None:
    clip = outcome["variable.mp4"]["clips"][0]
    assert clip["technical_variable_fps"] and not outcome["good.mp4"]["clips"][0]["technical_variable_fps"]
    assert clip["duration_s"] == pytest.approx(60 / 24 + 12 / 24, abs=0.06)
    assert clip["motion_camera"] == outcome["good.mp4"]["clips"][0]["motion_camera"] == "pan_left"


def test_a_delayed_start_counts_from_the_first_frame(outcome: dict[str, Any]) -> None:
    clip = outcome["delayed.mp4"]["clips"][0]
    assert clip["start_s"] == 0 and clip["duration_s"] == pytest.approx(2.5, abs=0.06)
    assert clip["reason_192p"] is None and clip["motion_camera"] == "pan_left"


def test_a_run_in_which_every_source_fails_exits_with_the_reasons(broken: Path, tmp_path: Path, curate: Any) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("empty.mp4", "text.mp4", "audio.mp4"):
        (source / name).write_bytes((broken / name).read_bytes())
    with pytest.raises(RunFailed, match=r"no source could be used: 1 empty, 1 no_video_stream, 1 not_media"):
        curate(source, tmp_path / "out")


def test_the_failure_budget_stops_a_run_that_goes_wrong_and_keeps_what_is_done(tmp_path: Path, curate: Any) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for index in range(6):
        (source / f"bad_{index}.mp4").write_text(f"no video {index}" * 20)
    _good(source / "good.mp4")
    budget = ("funnel.failure_budget.max_share=0.3", "funnel.failure_budget.min_items=4")
    with pytest.raises(RunFailed, match=r"stopped: \d of \d failed in the pass 'shots' \(\d not_media\)"):
        curate(source, tmp_path / "out", *budget)
    assert list((tmp_path / "out" / "work").glob("shots-*/sources-*"))
    assert not (tmp_path / "out" / "report.html").exists()


def test_absurd_sizes_are_refused_from_the_header(tmp_path: Path, curate: Any) -> None:
    source = tmp_path / "in"
    source.mkdir()
    _good(source / "good.mp4")
    _good(source / "big.mp4", seed=7, width_px=480, height_px=270)
    result = curate(source, tmp_path / "out", f"funnel.stages.ingest.max_frame_px={400 * 200}")
    assert {Path(s["uri"]).name: s["reason"] for s in result.sources} == {"good.mp4": None, "big.mp4": "too_large"}


def test_a_stage_that_raises_leaves_a_null_and_a_text_and_the_others_go_on(
    tmp_path: Path, curate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from waver_core.backends.embedded.photographic import Photographic

    def fail(self: Photographic, frames: np.ndarray) -> None:
        raise ValueError("out of paint")

    source = tmp_path / "in"
    source.mkdir()
    _good(source / "good.mp4")
    monkeypatch.setattr(Photographic, "score", fail)
    row = curate(source, tmp_path / "out").clips.to_pylist()[0]
    assert row["aesthetic_error"] == "ValueError: out of paint" and row["aesthetic_score"] is None
    assert row["motion_camera"] == "pan_left" and row["motion_error"] is None
    assert row["reason_192p"] is None and row["reason_480p"] == "aesthetic"


def test_a_file_that_kills_its_workers_is_quarantined(tmp_path: Path) -> None:
    config = load_config()
    work = WorkFolder(str(tmp_path / "out"), {"shots": "a", "scores": "b"}, "run")
    work.prepare()
    source = {"source_id": "cafe", "uri": str(_good(tmp_path / "good.mp4")), "kind": "video", "bytes": 1, "stamp": ""}
    for _ in range(config.funnel.max_attempts):
        work.begin_attempt("cafe")
    summary = ShotsPass(config, work)([source])
    assert summary[0]["reason"] == "crashes_worker"
    assert work.read_sources()[0][0]["status"] == "quarantined"


def test_an_unexpected_error_costs_one_file_and_not_the_run(tmp_path: Path, curate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    source.mkdir()
    _good(source / "good.mp4")
    _good(source / "odd.mp4", seed=8)
    real = curation.shots_pass.open_video

    def touchy(uri: str, **options: Any) -> Any:
        if uri.endswith("odd.mp4"):
            raise ZeroDivisionError("a bug")
        return real(uri, **options)

    monkeypatch.setattr(curation.shots_pass, "open_video", touchy)
    result = curate(source, tmp_path / "out")
    verdicts = {Path(s["uri"]).name: (s["status"], s["reason"]) for s in result.sources}
    assert verdicts == {"good.mp4": ("ok", None), "odd.mp4": ("quarantined", "internal_error")}


def test_a_missing_package_stops_the_run_with_the_command_that_mends_it(
    tmp_path: Path, curate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    _good(source / "good.mp4")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(BackendUnavailable, match="pip install rapidocr"):
        curate(source, tmp_path / "out")
