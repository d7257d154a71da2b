"""The stages one by one: windows of long shots, facts of files, duplicates, text that keeps its place, motion, input lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.shots import Shot
from curation.stage import ClipMedia, FrameRequest, Frames, SourceFacts, StreamFrame
from curation.stages import aesthetic, dedup, ingest, motion, overlay, segment, technical
from waver_core.backends.contracts import Overlay, TextBox
from waver_core.errors import MediaError, UserError
from waver_core.manifest import clip_id
from waver_core.registry import create
from waver_core.storage import remove, write_atomic
from waver_core.synthetic import Background, Border, Camera, Video, random_video, single_shot, truth
from waver_core.synthetic import Shot as Scene
from waver_core.video import VideoInfo, open_video, quarter_turns, resize, write_mp4

INFO = VideoInfo("h264", "mp4", "yuv420p", 128, 72, 1.0, 24.0, 10.0, 1000, False, 1, 0.0)
CLIP = FrameRequest(64, fps=8.0)


def facts(fps: float = 24.0, kind: str = "video", turns: int = 0, **info: Any) -> SourceFacts:
    return SourceFacts(replace(INFO, fps=fps, **info), kind, turns)


def feed_file(make: Callable[[SourceFacts], Any], uri: str) -> tuple[Any, int]:
    """A watcher that has seen a whole file as the first pass shows it, and the number of frames."""
    with open_video(uri, fast=True) as video:
        watcher, n = None, 0
        for frame in video.frames():
            watcher = watcher or make(SourceFacts(video.info, "video", quarter_turns(frame.picture)))
            scale = 72 / min(frame.picture.width, frame.picture.height)
            small = resize(frame.picture, round(frame.picture.width * scale), round(frame.picture.height * scale))
            watcher.add(StreamFrame(n, frame.time_s, small, frame.picture, None, frame.damaged))
            n += 1
        if hasattr(watcher, "bytes_read"):
            watcher.bytes_read = video.bytes_read
    return watcher, n


def feed_frames(watcher: Any, frames: np.ndarray, fps: float = 24.0, damaged: range = range(0)) -> Any:
    """A watcher that has seen small frames without a file."""
    for k, frame in enumerate(frames):
        watcher.add(StreamFrame(k, k / fps, frame, None, frame, k in damaged))
    return watcher


@pytest.mark.parametrize(
    ("request_", "start_s", "end_s", "expected"),
    [
        (FrameRequest(64, fps=2.0), 1.0, 3.0, [1.0, 1.5, 2.0, 2.5]),
        (FrameRequest(64, fps=2.0), 0.0, 0.2, [0.0]),
        (FrameRequest(64, count=4), 2.0, 4.0, [2.25, 2.75, 3.25, 3.75]),
        (FrameRequest(64, count=2), 0.0, 0.0, [0.0, 0.0]),
        (FrameRequest(64, fps=8.0), 5.0, 4.0, [5.0]),
    ],
)
def test_frame_requests_spread_over_the_clip(request_: FrameRequest, start_s: float, end_s: float, expected: list[float]) -> None:
    assert request_.times_s(start_s, end_s) == pytest.approx(expected)


# --- segment: windows of long shots ------------------------------------------------------------------------------------


def long_watcher(vectors: np.ndarray, n_frames: int, fps: float = 24.0, **options: Any) -> segment.SegmentWatcher:
    """A watcher that remembers n frames and an embedding every quarter of a second."""
    made = segment.Stage(segment.Options(**options)).watch(facts(fps))
    made._times_s = [k / fps for k in range(n_frames)]
    made._embedded_at = list(range(0, n_frames, max(1, round(fps / 4))))
    made._embeddings = [v.astype(np.float16) for v in vectors[: len(made._embedded_at)]]
    return made


def walk(seed: int, n: int) -> np.ndarray:
    """Unit vectors that drift, now slowly, now fast: like the frames of a take."""
    rng = np.random.default_rng(seed)
    pace = np.repeat(rng.uniform(0.02, 0.6, n // 12 + 1), 12)[:n, None]
    path = np.cumsum(rng.normal(0, 1, (n, 16)) * pace, axis=0) + rng.normal(0, 1, 16)
    return path / np.linalg.norm(path, axis=1, keepdims=True)


@given(
    seed=st.integers(0, 10_000),
    fps=st.sampled_from([12.0, 24.0, 29.97]),
    shot_s=st.floats(6.0, 40.0),
    start=st.integers(0, 60),
    max_s=st.sampled_from([3.0, 5.0]),
    max_windows=st.integers(1, 4),
)
@settings(max_examples=40)
def test_windows_of_a_long_shot(seed: int, fps: float, shot_s: float, start: int, max_s: float, max_windows: int) -> None:
    end = start + round(shot_s * fps)
    n = end + 30
    watcher = long_watcher(walk(seed, n), n, fps, max_s=max_s, max_windows=max_windows)
    rows = watcher._clips_of(5, Shot(start, end, "cut", "cut"))
    assert 1 <= len(rows) <= max_windows
    spans = [(r["start_frame"], r["end_frame"]) for r in rows]
    assert all(start <= a < b <= end for a, b in spans)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert all(abs(r["duration_s"] - max_s) <= 1 / fps + 1e-6 for r in rows)
    assert all(r["end_s"] - r["start_s"] == pytest.approx(r["duration_s"]) for r in rows)
    assert {r["segment_shot"] for r in rows} == {5}
    # Against brute force: no window that starts at an embedding is livelier than the liveliest one taken.
    at, vectors = np.array(watcher._embedded_at), np.array(watcher._embeddings, np.float32)
    best = math.inf
    for i in np.flatnonzero((at >= start) & (at / fps <= end / fps - max_s + 1e-6)):
        inside = (at >= at[i]) & (at / fps < at[i] / fps + max_s - 1e-6) & (at < end)
        best = min(best, segment.mean_pair_similarity(vectors[inside]))
    assert min(r["segment_similarity"] for r in rows) == pytest.approx(best, abs=1e-4)


def test_the_livelier_half_of_a_shot_is_taken() -> None:
    calm = np.tile(walk(0, 1), (60, 1))
    lively = walk(1, 60) * np.array([1, -1] * 30)[:, None]
    watcher = long_watcher(np.concatenate([calm, lively]), 720, max_windows=1)
    rows = watcher._clips_of(0, Shot(0, 720, "edge", "edge"))
    assert len(rows) == 1 and rows[0]["start_s"] >= 14.0
    assert rows[0]["segment_similarity"] < 0.3


@pytest.mark.parametrize(("n_frames", "n_clips"), [(239, 1), (240, 1), (250, 1), (480, 2), (800, 3), (2000, 3)])
def test_only_shots_longer_than_max_s_are_cut_into_windows(n_frames: int, n_clips: int) -> None:
    watcher = long_watcher(np.tile(walk(0, 1), (600, 1)), n_frames)
    rows = watcher._clips_of(0, Shot(0, n_frames, "edge", "edge"))
    assert len(rows) == n_clips
    if n_frames <= 240:
        assert (rows[0]["start_frame"], rows[0]["end_frame"]) == (0, n_frames)
    assert all(r["duration_s"] <= 10.0 + 1 / 24 for r in rows)
    assert [r["segment_shot_s"] for r in rows] == pytest.approx([n_frames / 24] * n_clips)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("dissolve", "cut", (12, 100)),
        ("cut", "fade", (10, 98)),
        ("blank", "dissolve", (12, 98)),
        ("cut", "edge", (10, 100)),
        ("gap", "gap", (10, 100)),
    ],
)
def test_clips_are_trimmed_next_to_gradual_transitions_only(before: str, after: str, expected: tuple[int, int]) -> None:
    watcher = long_watcher(walk(0, 40), 120, trim_frames=2)
    trimmed = watcher._trim(Shot(10, 100, before, after))
    assert (trimmed.start, trimmed.end) == expected
    short = Shot(10, 13, "dissolve", "fade")
    assert watcher._trim(short) == short  # nothing would be left


def test_mean_pair_similarity_is_the_mean_over_pairs() -> None:
    vectors = walk(3, 9)
    pairs = [float(a @ b) for a, b in combinations(vectors, 2)]
    assert segment.mean_pair_similarity(vectors) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("kind", ["cut", "dissolve", "fade"])
def test_clips_of_a_rendered_video_are_its_clean_shots(render_to_disk: Callable, kind: str) -> None:
    video = random_video(
        2, n_shots=3, width_px=256, height_px=144, durations_s=(2.1, 2.6), transitions=(kind,), name=f"segment_{kind}"
    )
    rendered = render_to_disk(video)
    watcher, n = feed_file(segment.Stage(segment.Options()).watch, rendered.uri)
    rows = watcher.clips()
    truth_spans = [(s["start_frame"], s["end_frame"]) for s in rendered.known["shots"]]
    spans = [(r["start_frame"], r["end_frame"]) for r in rows]
    assert len(spans) == 3 and spans[0][0] == 0 and spans[-1][1] == n
    error = np.abs(np.array(spans) - np.array(truth_spans)).max()
    assert error == 0 if kind == "cut" else error <= 4
    assert [r["segment_transition_in"] for r in rows] == ["edge", kind, kind]
    assert [r["segment_transition_out"] for r in rows] == [kind, kind, "edge"]
    for row, (a, b) in zip(rows, spans, strict=True):
        assert (row["start_s"], row["end_s"]) == pytest.approx((a / 24, b / 24))
        assert 0 < row["segment_similarity"] <= 1.001
    assert watcher.describe(rows) == [{}, {}, {}]


def test_damaged_frames_are_a_gap_between_clips(frames_of: Callable) -> None:
    frames = frames_of(single_shot(2, width_px=128, height_px=72, duration_s=3.0))
    watcher = feed_frames(segment.Stage(segment.Options()).watch(facts()), frames, damaged=range(30, 36))
    rows = watcher.clips()
    assert [(r["start_frame"], r["end_frame"]) for r in rows] == [(0, 30), (36, 72)]
    assert [(r["segment_transition_in"], r["segment_transition_out"]) for r in rows] == [("edge", "gap"), ("gap", "edge")]


def test_an_image_is_one_clip_of_one_frame() -> None:
    watcher = segment.Stage(segment.Options()).watch(facts(kind="image"))
    watcher.add(StreamFrame(0, 0.0, np.zeros((72, 128, 3), np.uint8), None, None, False))
    assert watcher.clips() == [{"start_frame": 0, "end_frame": 1, "start_s": 0.0, "end_s": 0.0, "duration_s": 0.0}]


# --- technical ---------------------------------------------------------------------------------------------------------


def describe(video: Video, folder: Path, spans: tuple[tuple[int, int], ...] = ((0, 24),), **options: Any) -> list[dict[str, Any]]:
    path = folder / "a.mp4"
    from waver_core.synthetic import write_video

    write_video(video, path)
    watcher, _ = feed_file(technical.Stage(technical.Options(**options)).watch, str(path))
    return watcher.describe([{"start_frame": a, "end_frame": b} for a, b in spans])


@pytest.mark.parametrize(
    ("border", "box"),
    [
        (Border(), [0, 0, 160, 96]),
        (Border(top_px=12, bottom_px=12), [0, 12, 160, 84]),
        (Border(left_px=24, right_px=16), [24, 0, 144, 96]),
        (Border(12, 12, 24, 24), [24, 12, 136, 84]),
    ],
)
def test_black_borders_are_measured(tmp_path: Path, border: Border, box: list[int]) -> None:
    video = replace(single_shot(4, width_px=160, height_px=96, duration_s=1.0), border=border)
    row = describe(video, tmp_path)[0]
    assert np.abs(np.array(row["technical_active_box"]) - np.array(box)).max() <= 1
    kept = (box[2] - box[0]) * (box[3] - box[1]) / (160 * 96)
    assert row["technical_black_border_ratio"] == pytest.approx(1 - kept, abs=0.02)
    assert (row["width_px"], row["height_px"], row["short_side_px"]) == (160, 96, 96)


def test_facts_of_a_file(tmp_path: Path) -> None:
    row = describe(single_shot(4, width_px=160, height_px=96, duration_s=2.0, fps=Fraction(30000, 1001)), tmp_path)[0]
    size_bits = (tmp_path / "a.mp4").stat().st_size * 8
    assert row["fps"] == pytest.approx(30000 / 1001) and row["technical_variable_fps"] is False
    assert (row["technical_codec"], row["technical_pixel_format"], row["technical_has_audio"]) == ("h264", "yuv420p", False)
    assert 0.5 * size_bits / 2 < row["technical_bitrate_kbps"] * 1000 <= size_bits / 2
    assert row["technical_bits_per_pixel"] == pytest.approx(row["technical_bitrate_kbps"] * 1000 / (row["fps"] * 160 * 96))


def test_a_dark_scene_is_no_border() -> None:
    dark = np.full((24, 72, 128, 3), 10, np.uint8)
    dark[:, 34:38, 60:68] = 200
    rows = feed_frames(technical.Stage(technical.Options()).watch(facts()), dark).describe([{"start_frame": 0, "end_frame": 24}])
    assert rows[0]["technical_black_border_ratio"] == 0.0
    black = feed_frames(technical.Stage(technical.Options()).watch(facts()), np.zeros_like(dark))
    assert black.describe([{"start_frame": 0, "end_frame": 24}])[0]["technical_black_border_ratio"] == 0.0


def test_each_clip_has_its_own_borders() -> None:
    frames = np.full((96, 72, 128, 3), 120, np.uint8)
    frames[48:, :12] = frames[48:, -12:] = 16
    watcher = feed_frames(technical.Stage(technical.Options()).watch(facts()), frames)
    rows = watcher.describe([{"start_frame": 0, "end_frame": 48}, {"start_frame": 48, "end_frame": 96}])
    assert [round(r["technical_black_border_ratio"], 3) for r in rows] == [0.0, round(24 / 72, 3)]


def test_turned_sources_are_described_upright() -> None:
    frames = np.full((12, 72, 128, 3), 120, np.uint8)
    frames[:, :, :16] = 16  # stored left: shown at the bottom after a counter-clockwise quarter turn
    watcher = feed_frames(technical.Stage(technical.Options()).watch(facts(turns=1)), frames)
    row = watcher.describe([{"start_frame": 0, "end_frame": 12}])[0]
    assert (row["width_px"], row["height_px"], row["technical_rotation_deg"]) == (72, 128, 90)
    assert row["technical_active_box"] == [0, 0, 72, 112]


def test_images_have_no_rate() -> None:
    watcher = technical.Stage(technical.Options()).watch(facts(0.0, "image"))
    row = feed_frames(watcher, np.full((1, 72, 128, 3), 90, np.uint8)).describe([{"start_frame": 0, "end_frame": 1}])[0]
    assert row["fps"] is None and row["technical_bitrate_kbps"] is None and row["technical_bits_per_pixel"] is None
    assert row["short_side_px"] == 72


@pytest.mark.parametrize(
    ("times", "declared", "fps", "variable"),
    [
        (np.arange(48) / 24, 24.0, 24.0, False),
        (np.round(np.arange(48) / 30, 3), 30.0, 30.0, False),  # a millisecond clock jitters
        (np.arange(48) / 24, 60.0, 24.0, False),  # the frames' own times are believed
        (np.cumsum([0.02, 0.06] * 24), 25.0, 25.0, True),
        (np.array([0.0]), 25.0, 25.0, False),
        (np.array([0.0]), 0.0, 0.0, False),
    ],
)
def test_frame_rate_from_times(times: np.ndarray, declared: float, fps: float, variable: bool) -> None:
    found = technical.frame_rate(times, declared)
    assert found == (pytest.approx(fps, rel=0.02), variable)


# --- dedup -------------------------------------------------------------------------------------------------------------


def brute_force(hashes: np.ndarray, kinds: np.ndarray, min_similarity: float) -> tuple[set[frozenset[int]], np.ndarray]:
    """Groups and best similarities by comparing every pair."""
    n = len(hashes)
    groups = [{i} for i in range(n)]
    nearest = np.zeros(n)
    for i, j in combinations(range(n), 2):
        if kinds[i] == kinds[j]:
            similarity = 1 - np.bitwise_count(hashes[i] ^ hashes[j]).mean() / 64
            nearest[i], nearest[j] = max(nearest[i], similarity), max(nearest[j], similarity)
            if similarity >= min_similarity and groups[i] is not groups[j]:
                groups[i] |= groups[j]
                for k in groups[j]:
                    groups[k] = groups[i]
    return {frozenset(g) for g in groups}, nearest


def planted(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Random hashes, some of them copies with up to three bits flipped a frame; which rows are such copies."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, (n, dedup.N_HASHES), dtype=np.uint64)
    copies = []
    for i in range(n // 3, n, 3):
        hashes[i] = hashes[int(rng.integers(0, i))]
        for frame in range(dedup.N_HASHES):
            for bit in rng.integers(0, 64, int(rng.integers(0, 4))):
                hashes[i, frame] ^= np.uint64(1) << np.uint64(bit)
        copies.append(i)
    kinds = np.array(["image" if rng.random() < 0.2 else "video" for _ in range(n)], object)
    return hashes, kinds, copies


def partition(parent: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(parent == root).tolist()) for root in set(parent.tolist())}


@pytest.mark.parametrize("seed", range(6))
def test_groups_agree_with_comparing_every_pair(seed: int) -> None:
    hashes, kinds, copies = planted(seed)
    assert len(copies) == 14
    parent, nearest = dedup.group_hashes(hashes, kinds, 0.9, 64)
    groups, best = brute_force(hashes, kinds, 0.9)
    assert partition(parent) == groups
    assert sum(len(g) > 1 for g in groups) >= 5
    close = best >= 0.9
    assert np.allclose(nearest[close], best[close])
    assert (nearest <= best + 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_groups_do_not_depend_on_the_order(seed: int) -> None:
    hashes, kinds, _ = planted(seed)
    order = np.random.default_rng(seed).permutation(len(hashes))
    groups = partition(dedup.group_hashes(hashes, kinds, 0.9, 64)[0])
    shuffled = partition(dedup.group_hashes(hashes[order], kinds[order], 0.9, 64)[0])
    assert {frozenset(int(order[i]) for i in g) for g in shuffled} == groups


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_clips_to_compare(n: int) -> None:
    parent, nearest = dedup.group_hashes(np.zeros((n, 5), np.uint64), np.array(["video"] * n, object), 0.9, 64)
    assert parent.tolist() == list(range(n)) and nearest.tolist() == [0.0] * n


def test_many_that_look_alike_stay_one_group_within_a_small_bucket() -> None:
    hashes = np.tile(np.arange(5, dtype=np.uint64), (500, 1))
    parent, nearest = dedup.group_hashes(hashes, np.array(["video"] * 500, object), 0.9, 4)
    assert set(parent.tolist()) == {0} and nearest.min() == 1.0


def clip_table(entries: list[dict[str, Any]]) -> pa.Table:
    schema = pa.schema(
        [
            ("clip_id", pa.string()),
            ("kind", pa.string()),
            ("short_side_px", pa.int32()),
            ("technical_bits_per_pixel", pa.float64()),
            ("dedup_hashes", pa.list_(pa.uint64(), dedup.N_HASHES)),
        ]
    )
    return pa.Table.from_pylist([{"kind": "video", "technical_bits_per_pixel": 0.1, **e} for e in entries], schema=schema)


def resolve(entries: list[dict[str, Any]], eligible: list[bool] | None = None) -> dict[str, dict[str, Any]]:
    table = clip_table(entries)
    found = dedup.Stage(dedup.Options()).resolve(table, np.array(eligible or [True] * len(entries)))
    names = table["clip_id"].to_pylist()
    return {n: {k: v[i].as_py() for k, v in found.items()} for i, n in enumerate(names)}


def test_of_a_group_the_best_quality_is_kept_and_the_rest_point_to_it() -> None:
    same = [1, 2, 3, 4, 5]
    entries = [
        {"clip_id": "a", "short_side_px": 360, "dedup_hashes": same},
        {"clip_id": "b", "short_side_px": 720, "technical_bits_per_pixel": 0.05, "dedup_hashes": same},
        {"clip_id": "c", "short_side_px": 720, "technical_bits_per_pixel": 0.2, "dedup_hashes": same},
        {"clip_id": "d", "short_side_px": None, "technical_bits_per_pixel": None, "dedup_hashes": same},
        {"clip_id": "e", "short_side_px": 1080, "dedup_hashes": [v ^ (2**64 - 1) for v in same]},
        {"clip_id": "f", "kind": "image", "short_side_px": 2160, "dedup_hashes": same},
    ]
    found = resolve(entries)
    assert {n: r["dedup_keep"] for n, r in found.items()} == {"a": False, "b": False, "c": True, "d": False, "e": True, "f": True}
    assert {n: r["dedup_group"] for n, r in found.items()} == {"a": "c", "b": "c", "c": "c", "d": "c", "e": "e", "f": "f"}
    assert found["a"]["dedup_similarity"] == 1.0
    assert resolve(entries[::-1]) == found


def test_clips_that_are_out_already_take_no_part() -> None:
    entries = [
        {"clip_id": c, "short_side_px": s, "dedup_hashes": [1, 2, 3, 4, 5]} for c, s in (("a", 720), ("b", 360), ("c", 90))
    ]
    entries.append({"clip_id": "d", "short_side_px": 1080, "dedup_hashes": None})
    found = resolve(entries, [False, True, True, True])
    assert found["a"] == found["d"] == {"dedup_group": None, "dedup_similarity": None, "dedup_keep": None}
    assert found["b"]["dedup_keep"] is True and found["c"]["dedup_group"] == "b"


def test_a_smaller_reencoded_copy_is_a_duplicate_and_other_scenes_are_not(tmp_path: Path, frames_of: Callable) -> None:
    entries = []
    for name, seed, size, crf in (
        ("big", 1, (320, 180), 18),
        ("copy", 1, (160, 90), 32),
        ("other", 2, (320, 180), 18),
        ("third", 3, (320, 180), 18),
    ):
        frames = frames_of(single_shot(seed, width_px=320, height_px=180, duration_s=2.0))
        path = str(tmp_path / f"{name}.mp4")
        write_mp4(path, (cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames), fps=24, crf=crf, preset="ultrafast")
        watcher, n = feed_file(dedup.Stage(dedup.Options()).watch, path)
        row = watcher.describe([{"start_frame": 0, "end_frame": n}])[0]
        assert len(row["dedup_hashes"]) == dedup.N_HASHES
        entries.append({"clip_id": name, "short_side_px": min(size), **row})
    found = resolve(entries)
    assert {n: r["dedup_group"] for n, r in found.items()} == {"big": "big", "copy": "big", "other": "other", "third": "third"}
    assert {n: r["dedup_keep"] for n, r in found.items()} == {"big": True, "copy": False, "other": True, "third": True}
    assert found["copy"]["dedup_similarity"] > 0.95


def test_a_perceptual_hash_forgives_light_and_size_and_knows_content(frames_of: Callable) -> None:
    a, b = (frames_of(single_shot(s, width_px=320, height_px=180, duration_s=0.05))[0] for s in (1, 2))
    hashes = [
        dedup.perceptual_hash(f)
        for f in (a, cv2.resize(a, (128, 72), interpolation=cv2.INTER_AREA), cv2.convertScaleAbs(a, alpha=0.8), b)
    ]
    distance = [(hashes[0] ^ h).bit_count() for h in hashes]
    assert distance[0] == 0 and max(distance[1:3]) <= 6 and distance[3] > 16


# --- overlay -----------------------------------------------------------------------------------------------------------


def box(left: float, top: float, right: float, bottom: float) -> TextBox:
    return TextBox(left, top, right, bottom, 0.9)


SUBTITLE = box(0.3, 0.85, 0.7, 0.92)
NO_MARK = Overlay(0.2, 0.0, None)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (SUBTITLE, True),
        (box(0.2, 0.85, 0.8, 0.92), True),  # a longer line of the same subtitles
        (box(0.3, 0.70, 0.7, 0.77), False),  # another height
        (box(0.72, 0.85, 0.95, 0.92), False),  # the same height, elsewhere
        (box(0.3, 0.85, 0.7, 0.99), False),  # another size
    ],
)
def test_text_on_the_same_line_is_in_the_same_place(other: TextBox, same: bool) -> None:
    assert overlay._same_place(SUBTITLE, other) is same
    assert overlay._same_place(other, SUBTITLE) is same


class FakeText:
    """Says for each frame, told by its grey level, what a test wants to be found there."""

    fingerprint = "fake"

    def __init__(self, boxes: list[list[TextBox]]) -> None:
        self.boxes, self.calls = boxes, 0

    def detect(self, frame: np.ndarray) -> list[TextBox]:
        self.calls += 1
        return self.boxes[int(frame[0, 0, 0]) // 20]


class FakeMark:
    """A watermark scorer with one answer."""

    def __init__(self, found: Overlay) -> None:
        self.found = found

    def score(self, frames: np.ndarray) -> Overlay:
        return self.found


def score_overlay(boxes: list[list[TextBox]], mark: Overlay = NO_MARK, **row: Any) -> tuple[dict[str, Any], FakeText]:
    stage = overlay.Stage(overlay.Options(frames=max(2, len(boxes))))
    text = FakeText(boxes)
    stage.__dict__.update(_text=text, _watermark=FakeMark(mark))
    rgb = np.stack([np.full((36, 64, 3), 20 * k, np.uint8) for k in range(len(boxes))])
    frames = Frames(rgb, np.arange(len(boxes)) / 2)
    return stage.score(ClipMedia({"kind": "video", **row}, dict.fromkeys(stage.requests(), frames))), text


def test_text_that_keeps_its_place_is_burned_in() -> None:
    wide = box(0.2, 0.85, 0.8, 0.92)
    row, _ = score_overlay([[SUBTITLE], [wide], [SUBTITLE], []])
    assert row["overlay_text_kind"] == "burned_in"
    assert row["overlay_text_area_ratio"] == pytest.approx((2 * SUBTITLE.area + wide.area) / 4)
    assert row["overlay_burned_in_area_ratio"] == pytest.approx(row["overlay_text_area_ratio"])
    assert row["overlay_text_boxes"] == 0.75


def test_text_that_moves_with_the_picture_is_scene_text() -> None:
    drifting = [[box(0.1 + 0.2 * k, 0.3, 0.25 + 0.2 * k, 0.4)] for k in range(4)]
    row, _ = score_overlay(drifting)
    assert row["overlay_text_kind"] == "scene" and row["overlay_burned_in_area_ratio"] == 0
    assert row["overlay_text_area_ratio"] == pytest.approx(drifting[0][0].area)


def test_no_text_at_all_and_text_in_one_frame_only() -> None:
    row, _ = score_overlay([[], [], [], []])
    assert (row["overlay_text_kind"], row["overlay_text_area_ratio"], row["overlay_text_boxes"]) == ("none", 0.0, 0.0)
    row, _ = score_overlay([[SUBTITLE], [], [], []])
    assert row["overlay_text_kind"] == "scene"


def test_a_frame_like_the_one_before_is_not_searched_again() -> None:
    stage = overlay.Stage(overlay.Options())
    text = FakeText([[SUBTITLE]])
    stage.__dict__.update(_text=text)
    row = stage._text_columns(np.zeros((4, 36, 64, 3), np.uint8))
    assert text.calls == 1 and row["overlay_text_boxes"] == 1.0 and row["overlay_text_kind"] == "burned_in"


def test_boxes_that_overlap_never_cover_more_than_the_picture() -> None:
    row, _ = score_overlay([[box(0, 0, 1, 0.9)] * 3] * 2)
    assert row["overlay_text_area_ratio"] == 1.0 and row["overlay_burned_in_area_ratio"] == 1.0


@pytest.mark.parametrize(
    ("clip", "source", "expected"),
    [(0.9, None, 0.9), (0.9, 0.1, 0.1), (0.1, 0.8, 0.8), (None, 0.6, 0.6), (None, None, 0.0), (0.4, 0.0, 0.0)],
)
def test_the_sources_verdict_on_watermarks_goes_before_the_clips(
    clip: float | None, source: float | None, expected: float
) -> None:
    where = (0.1, 0.1, 0.2, 0.2) if clip is not None else None
    row, _ = score_overlay([[], []], Overlay(clip, 0.01, where), overlay_source_watermark=source)
    assert row["overlay_watermark"] == expected
    assert (row.get("overlay_watermark_box") is not None) == (source is None and (clip or 0) >= 0.5)


def test_without_a_text_detector_the_columns_stay_null() -> None:
    stage = overlay.Stage(overlay.Options(text_backend=None))
    stage.__dict__.update(_watermark=FakeMark(Overlay(0.0, 0.0, None)))
    frames = Frames(np.zeros((4, 36, 64, 3), np.uint8), np.arange(4.0))
    row = stage.score(ClipMedia({"kind": "video"}, dict.fromkeys(stage.requests(), frames)))
    assert set(row) == {"overlay_watermark", "overlay_watermark_box"}
    assert "text_detector" not in stage.fingerprint()["backends"]


# --- motion ------------------------------------------------------------------------------------------------------------


def move(video: Video, frames: np.ndarray, kind: str = "video", fps: float | None = None) -> dict[str, Any]:
    stage = motion.Stage(motion.Options())
    times_s = np.arange(len(frames)) / (fps or float(video.fps))
    return stage.score(ClipMedia({"kind": kind}, {stage.requests()[0]: Frames(frames, times_s)}))


def empty_scene(camera: Camera, background: str, fps: int = 8) -> Video:
    """A world without shapes, at the flow's own size and rate, so that px per frame are px per step."""
    scene = Scene(2.5, Background(background, "ocean"), (), camera, seed=4)
    return Video("empty", (scene,), width_px=456, height_px=256, fps=Fraction(fps))


@pytest.mark.parametrize("background", ["terrain", "checks", "bokeh"])
@pytest.mark.parametrize(("camera", "rate"), [("pan_right", 0.1), ("pan_left", 0.2), ("tilt_up", 0.1), ("tilt_down", 0.15)])
def test_a_pan_over_a_still_has_no_foreground_and_the_true_speed(
    frames_of: Callable, camera: str, rate: float, background: str
) -> None:
    video = empty_scene(Camera(camera, rate), background)
    row = move(video, frames_of(video))
    speed = truth(video)["shots"][0]["background_speed_px_per_frame"]
    assert speed > 2
    assert row["motion_foreground_px"] < 0.3
    assert row["motion_background_px"] == pytest.approx(speed, rel=0.15)
    assert row["motion_camera"] == camera
    assert row["motion_active_ratio"] == 1.0


@pytest.mark.parametrize("camera", ["zoom_in", "zoom_out"])
def test_a_zoom_over_a_still_has_no_foreground(frames_of: Callable, camera: str) -> None:
    video = empty_scene(Camera(camera, zoom_factor_per_s=1.12), "terrain")
    row = move(video, frames_of(video))
    assert row["motion_camera"] == camera
    assert row["motion_foreground_px"] < 0.3 and row["motion_background_px"] > 1


@pytest.mark.parametrize(("background", "direction"), [("terrain", "right"), ("bokeh", "down_left"), ("checks", "left")])
def test_a_shape_before_a_static_camera_is_foreground(frames_of: Callable, background: str, direction: str) -> None:
    where = Background(background, "ocean")
    video = single_shot(4, background=where, direction=direction, duration_s=2.5, width_px=456, height_px=256, fps=8)
    row = move(video, frames_of(video))
    assert row["motion_camera"] == "static"
    assert row["motion_foreground_px"] > 2 > 0.2 > row["motion_background_px"]
    assert 0.02 < row["motion_foreground_ratio"] < 0.2
    assert row["motion_background_px"] < row["motion_total_px"] < row["motion_foreground_px"]


def test_a_shape_under_a_pan_is_told_from_the_camera(frames_of: Callable) -> None:
    camera = Camera("pan_right", 0.1)
    video = single_shot(
        4,
        camera=camera,
        background=Background("terrain", "ocean"),
        direction="down",
        duration_s=2.5,
        width_px=456,
        height_px=256,
        fps=8,
    )
    row = move(video, frames_of(video))
    assert row["motion_camera"] == "pan_right"
    assert row["motion_background_px"] == pytest.approx(3.2, rel=0.15)
    assert 2 < row["motion_foreground_px"] < 9


def test_speeds_do_not_depend_on_the_sources_rate_and_size(frames_of: Callable) -> None:
    camera = Camera("pan_right", 0.1)
    at_8 = empty_scene(camera, "terrain")
    at_4 = empty_scene(camera, "terrain", fps=4)
    small = replace(at_8, width_px=228, height_px=128)
    speeds = [move(v, frames_of(v))["motion_background_px"] for v in (at_8, at_4, small)]
    assert speeds == pytest.approx([3.2] * 3, rel=0.1)


def test_frames_that_repeat_are_no_stillness(frames_of: Callable) -> None:
    video = empty_scene(Camera("pan_right", 0.1), "terrain")
    frames = frames_of(video)
    stage = motion.Stage(motion.Options())
    doubled = Frames(np.repeat(frames, 2, axis=0), np.repeat(np.arange(len(frames)) / 8, 2))
    row = stage.score(ClipMedia({"kind": "video"}, {stage.requests()[0]: doubled}))
    assert row == move(video, frames)


def test_a_still_is_static_and_an_image_has_no_motion(frames_of: Callable) -> None:
    video = empty_scene(Camera("static"), "terrain")
    frames = frames_of(video)
    row = move(video, frames)
    assert row["motion_camera"] == "static" and row["motion_total_px"] == 0 and row["motion_active_ratio"] == 0
    assert move(video, frames, kind="image") == {}
    assert move(video, frames[:1]) == {}


def test_direction_entropy_from_one_way_to_all_ways() -> None:
    angles = np.linspace(0, 2 * np.pi, 800, endpoint=False) + 0.01
    every = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert motion.direction_entropy(every) == pytest.approx(1.0, abs=0.01)
    assert motion.direction_entropy(np.tile([[1.0, 0.2]], (50, 1))) == 0.0
    two_ways = np.array([[1.0, 0.2], [-1.0, -0.2]] * 20)
    assert motion.direction_entropy(two_ways) == pytest.approx(1 / 3)
    assert motion.direction_entropy(np.zeros((5, 2))) == motion.direction_entropy(np.zeros((0, 2))) == 0.0


# --- aesthetic ---------------------------------------------------------------------------------------------------------


def test_aesthetic_is_the_mean_over_frames_with_its_parts(frames_of: Callable) -> None:
    frames = frames_of(single_shot(1, duration_s=0.1))[:2]
    frames = np.concatenate([frames, cv2.GaussianBlur(frames[0], (0, 0), 5)[None]])
    stage = aesthetic.Stage(aesthetic.Options(frames=3))
    row = stage.score(ClipMedia({"kind": "video"}, {stage.requests()[0]: Frames(frames, np.arange(3.0))}))
    found = create("aesthetic_scorer", "photographic").score(frames)
    assert row["aesthetic_score"] == pytest.approx(float(found.score.mean()))
    assert row["aesthetic_frames"] == pytest.approx(found.score.tolist())
    assert row["aesthetic_frames"][2] < row["aesthetic_frames"][0] - 1
    assert set(row) == {c.name for c in stage.columns}
    assert row["aesthetic_sharpness"] == pytest.approx(float(found.parts["sharpness"].mean()))


# --- ingest ------------------------------------------------------------------------------------------------------------

INGEST = ingest.Stage(ingest.Options())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with videos, an image, something else, and what must not be listed."""
    for name in ("b.mp4", "a.MOV", "deep/c.webm", "pic.JPG", "notes.txt", ".hidden.mp4", ".cache/d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def names(rows: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    return {str(Path(r["uri"]).relative_to(folder)): r["kind"] for r in rows}


def test_a_folder_is_listed_deep_with_the_kind_of_each_file(files: Path) -> None:
    rows = INGEST.list_input(str(files))
    expected = {"a.MOV": "video", "b.mp4": "video", "deep/c.webm": "video", "notes.txt": "other", "pic.JPG": "image"}
    assert names(rows, files) == expected
    assert [r["uri"] for r in rows] == sorted(r["uri"] for r in rows)
    assert all(r["dataset"] is r["licence"] is r["style"] is None for r in rows)


def test_a_glob_and_a_single_file(files: Path) -> None:
    assert names(INGEST.list_input(f"{files}/*.mp4"), files) == {"b.mp4": "video"}
    assert names(INGEST.list_input(f"{files}/**/*.webm"), files) == {"deep/c.webm": "video"}
    assert names(INGEST.list_input(f"{files}/b.mp4"), files) == {"b.mp4": "video"}


def test_other_file_systems_are_listed_with_their_scheme() -> None:
    write_atomic("memory://test-ingest/a.mp4", b"1")
    rows = INGEST.list_input("memory://test-ingest")
    assert [(r["uri"].split(":")[0], r["kind"]) for r in rows] == [("memory", "video")]
    assert INGEST.identify(rows[0]["uri"])["bytes"] == 1
    remove("memory://test-ingest", recursive=True)


def write_list(path: Path, rows: list[dict[str, Any]]) -> str:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        lines = [",".join(table.column_names), *(",".join(str(v or "") for v in r.values()) for r in table.to_pylist())]
        path.write_text("\n".join(lines) + "\n")
    else:
        import json

        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_lists_carry_licences_and_are_relative_to_themselves(files: Path, suffix: str) -> None:
    rows = [
        {"uri": "b.mp4", "dataset": "ours", "licence": "CC0", "extra": 1},
        {"uri": str(files / "deep" / "c.webm"), "dataset": "theirs", "licence": None, "extra": 2},
        {"uri": "s3://bucket/x.mp4", "dataset": "cloud", "licence": "CC-BY", "extra": 3},
        {"uri": "b.mp4", "dataset": "again", "licence": "none", "extra": 4},
    ]
    found = INGEST.list_input(write_list(files / f"list{suffix}", rows))
    assert {r["uri"]: (r["dataset"], r["licence"], r["style"]) for r in found} == {
        str(files / "b.mp4"): ("ours", "CC0", None),
        str(files / "deep" / "c.webm"): ("theirs", None, None),
        "s3://bucket/x.mp4": ("cloud", "CC-BY", None),
    }
    assert all(set(r) == {"uri", "kind", "dataset", "licence", "style"} for r in found)


def refused(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        INGEST.list_input(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_list_without_a_uri_column_names_the_columns_it_has(tmp_path: Path, suffix: str) -> None:
    text = refused(write_list(tmp_path / f"list{suffix}", [{"path": "a.mp4", "licence": "x"}]))
    assert "has no column 'uri', only: path, licence" in text


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_list_that_is_none(tmp_path: Path, suffix: str) -> None:
    assert "no such list" in refused(str(tmp_path / f"none{suffix}"))
    (tmp_path / f"bad{suffix}").write_bytes(b"\x00\x01 nothing of the kind {")
    assert f"bad{suffix}" in refused(str(tmp_path / f"bad{suffix}"))


def test_an_input_that_is_missing_or_empty(tmp_path: Path) -> None:
    assert refused(str(tmp_path / "none")) == f"no such input: {tmp_path}/none"
    assert "no files in" in refused(str(tmp_path))
    assert "no files in" in refused(f"{tmp_path}/*.mp4")


def test_identity_is_by_content_and_bad_files_have_reasons(files: Path) -> None:
    (files / "copy.mp4").write_bytes((files / "b.mp4").read_bytes())
    (files / "zero.mp4").touch()
    first, copy = (INGEST.identify(str(files / n)) for n in ("b.mp4", "copy.mp4"))
    assert first["source_id"] == copy["source_id"] and first["bytes"] == 5
    assert first["source_id"] != INGEST.identify(str(files / "a.MOV"))["source_id"]
    assert clip_id(first["source_id"], 0, 10) == clip_id(copy["source_id"], 0, 10)
    reasons = []
    for stage, name in ((INGEST, "zero.mp4"), (INGEST, "none.mp4"), (ingest.Stage(ingest.Options(max_bytes=4)), "b.mp4")):
        with pytest.raises(MediaError) as caught:
            stage.identify(str(files / name))
        reasons.append(caught.value.reason)
    assert reasons == ["empty", "unreadable", "too_large"]
