"""Segment and dedup with an embedder that sees a few larger frames: DINOv2's place, taken by one that reads a code."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from curation.embedded_samples import EmbeddedSamples
from curation.shots import ShotRules, scene_cuts
from curation.stage import SourceFacts, StreamFrame
from curation.stages import dedup, segment
from waver_core import registry
from waver_core.backends.pretrained.dinov2 import Dinov2
from waver_core.errors import ConfigError
from waver_core.manifest import build_schema, read_tables, rows_to_table, write_table
from waver_core.synthetic import single_shot
from waver_core.video import VideoInfo, open_video, quarter_turns, write_mp4

RULES = ShotRules()


class CornerCode:
    """One of 16 orthogonal vectors by the grey level of the upper left corner, with a little of the picture's mean."""

    fingerprint = "corner_code-1"
    short_side_px = 90

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [T, 17]."""
        self.shapes.append(frames.shape)
        corner = frames[:, :2, :2].mean(axis=(1, 2, 3))
        code = np.eye(17, dtype=np.float32)[(corner // 16).astype(int)]
        code[:, 16] = frames.mean(axis=(1, 2, 3)) / 2550
        return code / np.linalg.norm(code, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def corner_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known to these tests only: others go through all that is registered."""
    monkeypatch.setitem(registry._BACKENDS, ("frame_embedder", "corner_code"), CornerCode)


def facts(kind: str = "video", turns: int = 0, fps: float = 24.0) -> SourceFacts:
    return SourceFacts(VideoInfo("mp4", "h264", "yuv420p", 160, 90, 1.0, fps, 5.0, None, False, 1, 0.0), kind, turns)


def coded_frames(levels: list[int], height: int = 90, width: int = 160) -> np.ndarray:
    """One picture over and over, whose corner alone tells which scene it is."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    picture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 5), None, 20, 235, cv2.NORM_MINMAX)
    frames = np.stack([picture] * len(levels))
    for frame, level in zip(frames, levels, strict=True):
        frame[:4, :4] = level
    return frames


# --- cuts that only a scene embedder sees ------------------------------------------------------------------------------


def unit(*angles_deg: float) -> np.ndarray:
    return np.stack([(np.cos(a), np.sin(a)) for a in np.deg2rad(angles_deg)])


def test_a_cut_between_two_samples_is_put_where_neighbouring_frames_differ_most() -> None:
    at, similarity = np.arange(0, 48, 6), np.full(48, 0.99)
    similarity[27] = 0.95  # between the samples at 24 and 30
    vectors = unit(0, 5, 0, 5, 5, 90, 95, 90)
    assert scene_cuts(at, vectors, similarity, [], [], RULES) == [27]
    for known in [(27, 27)], [(25, 40)], [(10, 60)], [(30, 30)]:
        assert scene_cuts(at, vectors, similarity, [], known, RULES) == []
    assert scene_cuts(at, vectors, similarity, [], [(20, 20), (40, 44)], RULES) == [27]


def test_a_drop_among_drops_is_a_fast_move() -> None:
    at, similarity = np.arange(0, 48, 6), np.full(48, 0.99)
    assert scene_cuts(at, unit(*range(0, 8 * 70, 70)), similarity, [], [], RULES) == []


def test_a_proposed_cut_needs_less() -> None:
    at, similarity = np.arange(0, 48, 6), np.full(48, 0.99)
    similarity[[22, 27]] = 0.97, 0.98
    vectors = unit(0, 5, 0, 5, 60, 65, 60, 65)  # a cosine of 0.57 between the samples at 18 and 24
    assert scene_cuts(at, vectors, similarity, [], [], RULES) == []
    assert scene_cuts(at, vectors, similarity, [21], [], RULES) == [22]
    assert scene_cuts(at, vectors, similarity, [27], [], RULES) == []
    assert scene_cuts(at[:1], vectors[:1], similarity[:3], [1], [], RULES) == []


def feed(watcher: Any, frames: np.ndarray, fps: float = 24.0) -> Any:
    for k, frame in enumerate(frames):
        watcher.add(StreamFrame(k, k / fps, np.ascontiguousarray(frame), None, frame, False))
    return watcher


def test_segment_cuts_between_scenes_that_look_alike() -> None:
    frames = coded_frames([40] * 63 + [200] * 60)
    alone = feed(segment.Stage(segment.Options()).watch(facts()), frames).clips()
    assert [(r["start_frame"], r["end_frame"]) for r in alone] == [(0, 123)]
    rows = feed(segment.Stage(segment.Options(scene_backend="corner_code")).watch(facts()), frames).clips()
    assert [(r["start_frame"], r["end_frame"]) for r in rows] == [(0, 63), (63, 123)]
    assert all(r["segment_similarity"] > 0.999 for r in rows)
    assert alone[0]["segment_similarity"] > 0.8 and rows[1]["segment_transition_in"] == "cut"


def test_windows_of_a_long_shot_lie_where_the_scene_embedder_sees_most() -> None:
    levels = [40] * 240 + [40 + 16 * (k // 12 % 10) for k in range(96)] + [40] * 144
    options = segment.Options(
        scene_backend="corner_code", max_s=4.0, max_windows=1, scene_cut_similarity=-1, scene_confirm_similarity=-1
    )
    (row,) = feed(segment.Stage(options).watch(facts()), coded_frames(levels)).clips()
    assert row["start_frame"] == 240 and row["end_frame"] == 336


def test_a_large_embedder_is_no_backend_of_every_frame() -> None:
    with pytest.raises(ConfigError, match=r"corner_code wants frames of 90 px.*scene_backend"):
        segment.Stage(segment.Options(backend="corner_code")).watch(facts())


def test_fingerprints_hold_both_embedders_and_what_was_fetched() -> None:
    plain = segment.Stage(segment.Options())
    both = segment.Stage(segment.Options(scene_backend="dinov2", scene_backend_options={"revision": "0123abc"}))
    assert plain.backend_fingerprints() == {"frame_embedder": "color_layout-2"}
    assert both.backend_fingerprints()["frame_embedder"].startswith("color_layout-2, dinov2")
    assert "@0123abc" in str(both.fingerprint()) and plain.fingerprint() != both.fingerprint()
    assert dedup.Stage(dedup.Options()).backend_fingerprints() == {}
    assert dedup.Stage(dedup.Options(backend="dinov2")).backend_fingerprints() == {"frame_embedder": Dinov2().fingerprint}


# --- samples -----------------------------------------------------------------------------------------------------------


def test_samples_are_upright_small_and_in_order(tmp_path: Path) -> None:
    path = str(tmp_path / "coded.mp4")
    levels = [16 * (k // 10) for k in range(100)]
    write_mp4(path, coded_frames(levels, 270, 360), fps=24, crf=4, preset="ultrafast")
    embedder, samples = CornerCode(), None
    with open_video(path) as video:
        for k, frame in enumerate(video.frames()):
            turns = quarter_turns(frame.picture)
            samples = samples or EmbeddedSamples(embedder, SourceFacts(video.info, "video", turns))
            samples.add(StreamFrame(k, frame.time_s, np.zeros((2, 2, 3), np.uint8), frame.picture, None, False))
    assert samples is not None
    at, vectors = samples.finish()
    assert at == list(range(100)) and len(vectors) == 100 and vectors[0].dtype == np.float16
    assert {shape[1:] for shape in embedder.shapes} == {(90, 120, 3)} and sum(s[0] for s in embedder.shapes) == 100
    assert len({shape[0] for shape in embedder.shapes}) > 1  # the last batch is not full
    assert samples.finish() == (at, vectors)
    turned = EmbeddedSamples(embedder, facts(turns=1))
    with open_video(path) as video:
        turned.add(StreamFrame(0, 0.0, np.zeros((2, 2, 3), np.uint8), next(iter(video.frames())).picture, None, False))
    turned.finish()
    assert embedder.shapes[-1] == (1, 120, 90, 3)


def test_a_source_that_changes_its_size_is_embedded_in_parts() -> None:
    embedder = CornerCode()
    samples = EmbeddedSamples(embedder, facts())
    for k, size in enumerate([(90, 160), (90, 160), (160, 90), (40, 60)]):
        samples.add(StreamFrame(k, k / 24, np.zeros((2, 2, 3), np.uint8), None, np.zeros((*size, 3), np.uint8), False))
    assert len(samples.finish()[1]) == 4
    assert embedder.shapes == [(2, 90, 160, 3), (1, 160, 90, 3), (1, 40, 60, 3)]


# --- dedup by embeddings -----------------------------------------------------------------------------------------------


def brute_force(vectors: np.ndarray, kinds: np.ndarray, min_similarity: float) -> tuple[set[frozenset[int]], np.ndarray]:
    """Groups and best cosines by comparing every pair in float64."""
    wide = vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    groups, nearest = [{i} for i in range(len(wide))], np.zeros(len(wide))
    for i, j in combinations(range(len(wide)), 2):
        if kinds[i] == kinds[j]:
            cosine = float(wide[i] @ wide[j])
            nearest[i], nearest[j] = max(nearest[i], cosine), max(nearest[j], cosine)
            if cosine >= min_similarity and groups[i] is not groups[j]:
                groups[i] |= groups[j]
                for k in groups[j]:
                    groups[k] = groups[i]
    return {frozenset(g) for g in groups}, nearest


def planted(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 24))
    for i in range(n // 3, n, 2):
        vectors[i] = vectors[int(rng.integers(0, i))] + rng.normal(size=24) * rng.uniform(0.05, 0.6)
    return vectors.astype(np.float16), (rng.random(n) < 0.2).astype(int)


def partition(parent: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(parent == root).tolist()) for root in set(parent.tolist())}


@pytest.mark.parametrize("block", [7, 16, 4096])
@pytest.mark.parametrize("seed", range(4))
def test_groups_agree_with_comparing_every_pair(seed: int, block: int) -> None:
    vectors, kinds = planted(seed)
    parent, nearest = dedup.group_embeddings(vectors, kinds, 0.9, block)
    groups, best = brute_force(vectors, kinds, 0.9)
    assert partition(parent) == groups and sum(len(g) > 1 for g in groups) >= 5
    assert all(parent[min(g)] == min(g) for g in groups)
    np.testing.assert_allclose(nearest, best, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_clips_to_compare(n: int) -> None:
    parent, nearest = dedup.group_embeddings(np.ones((n, 4), np.float16), np.zeros(n, int), 0.9)
    assert parent.tolist() == list(range(n)) and nearest.tolist() == [0.0] * n


def test_many_that_look_alike_are_one_group() -> None:
    parent, nearest = dedup.group_embeddings(np.ones((500, 8), np.float16), np.zeros(500, int), 0.9, block=64)
    assert set(parent.tolist()) == {0} and nearest.min() == pytest.approx(1.0) and nearest.max() <= 1.0


def test_embeddings_go_through_the_manifest_and_the_best_copy_is_kept(tmp_path: Path, frames_of: Callable) -> None:
    stage = dedup.Stage(dedup.Options(backend="corner_code"))
    assert stage.columns[0].name == "dedup_embedding"
    assert dedup.Stage(dedup.Options()).columns[0].name == "dedup_hashes"
    rows = []
    for name, level, size in (("big", 40, (320, 180)), ("copy", 40, (160, 90)), ("other", 120, (320, 180))):
        frames = frames_of(single_shot(1, width_px=320, height_px=180, duration_s=2.0)).copy()
        frames[:, :8, :8] = level
        watcher = stage.watch(facts())
        for k, frame in enumerate(frames):
            full = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            watcher.add(StreamFrame(k, k / 24, full, None, full, False))
        described = watcher.describe([{"start_frame": 0, "end_frame": len(frames)}, {"start_frame": 0, "end_frame": 1}])
        assert np.linalg.norm(described[0]["dedup_embedding"].astype(np.float32)) == pytest.approx(1, abs=1e-3)
        rows.append({"clip_id": name, "kind": "video", "short_side_px": size[1], **described[0]})
    rows.append({"clip_id": "image", "kind": "image", "short_side_px": 1080, "dedup_embedding": rows[0]["dedup_embedding"]})
    rows.append({"clip_id": "out", "kind": "video", "short_side_px": 1080, "dedup_embedding": rows[0]["dedup_embedding"]})
    rows.append({"clip_id": "unseen", "kind": "video", "short_side_px": 1080})
    schema = build_schema({"technical": [], "dedup": stage.columns})
    for column in ("short_side_px", "technical_bits_per_pixel"):
        if column not in schema.names:
            schema = schema.append(pa.field(column, pa.float64()))
    write_table(str(tmp_path / "clips.parquet"), rows_to_table(rows, schema))
    table = read_tables([str(tmp_path / "clips.parquet")], schema)
    eligible = np.array([r["clip_id"] != "out" for r in rows])
    found = {name: column.to_pylist() for name, column in stage.resolve(table, eligible).items()}
    assert found["dedup_group"] == ["big", "big", "other", "image", None, None]
    assert found["dedup_keep"] == [True, False, True, True, None, None]
    assert found["dedup_similarity"][0] == found["dedup_similarity"][1] > 0.999 > 0.5 > found["dedup_similarity"][2]
    reverse = stage.resolve(table.take(pa.array(range(len(rows))[::-1])), eligible[::-1])
    assert {name: column.to_pylist()[::-1] for name, column in reverse.items()} == found
    nobody = stage.resolve(table, np.zeros(len(rows), bool))
    assert all(column.null_count == len(rows) for column in nobody.values())


def test_a_second_is_enough_between_samples() -> None:
    stage = dedup.Stage(dedup.Options(backend="corner_code"))
    watcher = feed(stage.watch(facts()), coded_frames([40] * 100))
    watcher.describe([{"start_frame": 0, "end_frame": 100}])
    assert watcher._samples.finish()[0] == [0, 24, 48, 72, 96]
    assert all(b - a == 24 for a, b in pairwise(watcher._samples.finish()[0]))
