"""Stopped anywhere and run again: the very same rows, nothing lost, nothing twice, no finished source decoded again."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import waver_core.storage
from curation.shots_pass import ShotsPass
from waver_core.errors import RunFailed
from waver_core.video import OpenVideo


class Killed(BaseException):
    """What SIGKILL looks like from the inside: no handler of ordinary errors may catch it."""


@pytest.mark.parametrize("survives", [0, 1, 2, 4, 7, 11, 16, 22, 30])
def test_a_run_killed_at_any_write_ends_with_the_same_rows(
    survives: int, collection: Path, tmp_path: Path, curate: Any, rows_of: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [survives]
    replace = waver_core.storage.os.replace

    def dying_replace(source: str, target: str) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(waver_core.storage.os, "replace", dying_replace)
        with pytest.raises(Killed):
            curate(collection, tmp_path)
    curate(collection, tmp_path)
    assert rows_of(tmp_path) == undisturbed


def test_finished_sources_are_never_decoded_again(
    collection: Path, tmp_path: Path, curate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    process = ShotsPass._process

    def counting(self: ShotsPass, source: dict[str, Any], timer: Any) -> Any:
        opened.append(source["uri"])
        if len(opened) == 3:
            raise Killed
        return process(self, source, timer)

    with monkeypatch.context() as patch:
        patch.setattr(ShotsPass, "_process", counting)
        with pytest.raises(Killed):
            curate(collection, tmp_path)
        finished = set(opened[:2])
        curate(collection, tmp_path)
        curate(collection, tmp_path)
    assert not finished & set(opened[3:])
    assert len(opened[2:]) == len(set(opened[2:])) + 1  # only the one that was interrupted came twice


def test_only_new_files_are_processed(collection: Path, tmp_path: Path, curate: Any, rows_of: Any, undisturbed: Any) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("mixed_1.mp4", "still.mp4"):
        shutil.copy(collection / name, source / name)
    first = curate(source, tmp_path / "out")
    before = {r["clip_id"]: r for r in rows_of(tmp_path / "out")}
    for name in ("mixed_2.mp4", "mixed_3.mp4", "copy.mp4"):
        shutil.copy(collection / name, source / name)
    second = curate(source, tmp_path / "out")
    assert (first.decoded_sources, second.decoded_sources) == (2, 2)
    after = {r["clip_id"]: r for r in rows_of(tmp_path / "out")}
    assert set(after) == {r["clip_id"] for r in undisturbed}
    assert all(after[key]["aesthetic_score"] == row["aesthetic_score"] for key, row in before.items())


def test_a_changed_option_of_a_stage_recomputes_and_a_changed_threshold_does_not(
    collection: Path, tmp_path: Path, curate: Any
) -> None:
    assert curate(collection, tmp_path).decoded_sources == 4
    assert curate(collection, tmp_path, "tiers.480p.aesthetic.min=7").decoded_sources == 0
    assert curate(collection, tmp_path, "funnel.stages.segment.max_s=8").decoded_sources == 4


def test_a_source_that_kills_its_worker_is_given_up_after_three_tries(collection: Path, tmp_path: Path) -> None:
    from curation.workfolder import WorkFolder

    work = WorkFolder(str(tmp_path), {"shots": "k"}, "run")
    work.prepare()
    assert [work.begin_attempt("s") for _ in range(4)] == [1, 2, 3, 4]
    work.end_attempts(["s"])
    assert work.begin_attempt("s") == 1
    # A new run starts its own count: a killed driver must not be held against the files in flight.
    assert WorkFolder(str(tmp_path), {"shots": "k"}, "other run").begin_attempt("s") == 1


def test_the_fullest_of_several_score_rows_counts(
    collection: Path, tmp_path: Path, curate: Any, rows_of: Any, undisturbed: Any
) -> None:
    """Cut short after aesthetic, then after overlay, then not at all: every loosening must show, in whatever order rows lie."""
    first = "tiers.192p.a={column: aesthetic_score, min: 10}"
    second = "tiers.192p.b={column: overlay_text_boxes, min: 1000}"
    for overrides, reached in (((first,), "overlay"), ((second,), "motion")):
        with pytest.raises(RunFailed):
            curate(collection, tmp_path, *overrides)
        assert {r["skipped_from"] for r in rows_of(tmp_path)} == {reached}
    curate(collection, tmp_path)
    assert rows_of(tmp_path) == undisturbed


def test_no_frame_is_decoded_more_than_twice(
    collection: Path, tmp_path: Path, curate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[tuple[str, float]] = Counter()
    frames = OpenVideo.frames

    def counting(self: OpenVideo) -> Any:
        for frame in frames(self):
            seen[self.container.name, frame.time_s] += 1
            yield frame

    monkeypatch.setattr(OpenVideo, "frames", counting)
    curate(collection, tmp_path, "funnel.score_reference_frames_only=false")
    assert set(seen.values()) <= {1, 2} and 2 in seen.values()
