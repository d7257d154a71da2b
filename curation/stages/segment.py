"""Segment (Waver §3.1): shots, then clips of at most 10 s without the transitions between them.

PySceneDetect first; frame descriptors confirm its cuts, find the ones it misses and measure how much happens inside a
shot; dissolves and fades are found and cut off (`curation.shots`, `curation.gradual`). From a shot longer than `max_s`
the windows with the lowest internal similarity are taken, since that is where something happens. Shots under 2 s become
clips as well: the `duration` gate of the first tier rejects them, so that their rows stay.

The report shows DINOv2 each frame. Here a cheap descriptor of every frame says where a cut is, to the frame, and with
`scene_backend: dinov2` a model sees a few larger frames a second: it says whether the scene is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field
from scenedetect import AdaptiveDetector, FrameTimecode

from curation import stage
from curation.embedded_samples import EmbeddedSamples
from curation.gradual import gradual_transitions
from curation.shots import Shot, ShotRules, hard_cuts, scene_cuts, split_shots
from curation.stage import BackendUse, Row, SourceFacts, StreamFrame
from waver_core.backends.contracts import FrameEmbedder
from waver_core.config import Strict
from waver_core.errors import ConfigError
from waver_core.manifest import Column

SMALL_SHORT_SIDE_PX = 72
"""Short side of the picture that the first pass makes of every frame."""
_CHUNK_FRAMES = 64
_THUMB_SIDES = (32, 18)


class Options(Strict):
    """Lengths of clips and thresholds of shot detection."""

    backend: str = "color_layout"
    """Sees every frame, small."""
    backend_options: dict[str, Any] = {}
    scene_backend: str | None = None
    """Sees `embeddings_per_s` larger frames a second; finds cuts between scenes that look alike to `backend`, and measures how
    much happens in a clip. None: `backend` does that too."""
    scene_backend_options: dict[str, Any] = {}
    max_s: float = Field(10.0, gt=0)
    max_windows: int = Field(3, ge=1)
    """Clips taken from one shot longer than max_s."""
    embeddings_per_s: float = Field(4.0, gt=0)
    trim_frames: int = Field(1, ge=0)
    """Frames cut off a clip next to a dissolve or fade, on top of the transition itself."""
    adaptive_threshold: float = Field(3.5, gt=0)
    adaptive_window: int = Field(3, ge=1)
    adaptive_min_shot_s: float = Field(0.6, ge=0)
    cut_similarity: float = Field(0.6, ge=-1, le=1)
    confirm_similarity: float = Field(0.86, ge=-1, le=1)
    scene_cut_similarity: float = Field(0.5, ge=-1, le=1)
    scene_confirm_similarity: float = Field(0.75, ge=-1, le=1)
    """Of neighbouring samples of `scene_backend`; below the first there is a cut between them, below the second a cut that
    PySceneDetect proposed is one. Chosen for DINOv2, whose cosine is near 0 between scenes and above 0.8 within one."""


class Stage(stage.Stage):
    """Makes the clips; every other stage describes them."""

    name = "segment"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("stream",)
    columns = (
        Column("segment_shot", pa.int32(), "number of the shot in its source, from 0"),
        Column("segment_shot_s", pa.float64(), "length of the whole shot", "s"),
        Column("segment_transition_in", pa.string(), "what precedes the shot: cut, dissolve, fade, blank, gap, edge"),
        Column("segment_transition_out", pa.string(), "what follows the shot"),
        Column("segment_similarity", pa.float64(), "mean cosine between frames of the clip; low where much happens", score=True),
    )

    def backends(self) -> list[BackendUse]:
        """The embedder of every frame and, if asked for, that of scenes."""
        o = self.options
        uses = [BackendUse("frame_embedder", o.backend, o.backend_options)]
        if o.scene_backend is not None:
            uses.append(BackendUse("frame_embedder", o.scene_backend, o.scene_backend_options))
        return uses

    def backend_fingerprints(self) -> dict[str, str]:
        """Both embedders under one capability, joined."""
        return {"frame_embedder": ", ".join(str(use.create().fingerprint) for use in self.backends())}

    @cached_property
    def _embedders(self) -> list[FrameEmbedder]:
        embedders: list[FrameEmbedder] = [use.create() for use in self.backends()]
        if embedders[0].short_side_px > SMALL_SHORT_SIDE_PX:
            raise ConfigError(
                f"segment: {self.options.backend} wants frames of {embedders[0].short_side_px} px, and every frame is seen at "
                f"{SMALL_SHORT_SIDE_PX} px only: name it as scene_backend"
            )
        return embedders

    def watch(self, source: SourceFacts) -> SegmentWatcher:
        """A watcher that collects the signals of one source."""
        return SegmentWatcher(self.options, source, *self._embedders)


class SegmentWatcher:
    """Collects per-frame signals in bounded memory: about 0.6 kB a frame, whatever the picture's size."""

    def __init__(
        self, options: Options, source: SourceFacts, embedder: FrameEmbedder, scene_embedder: FrameEmbedder | None = None
    ) -> None:
        self._options, self._kind = options, source.kind
        self._fps = source.info.fps if 1 <= source.info.fps <= 240 else 25.0
        self._embedder = embedder
        self._stride = max(1, round(self._fps / options.embeddings_per_s))
        self._scenes = EmbeddedSamples(scene_embedder, source) if scene_embedder is not None else None
        self._detector = AdaptiveDetector(
            options.adaptive_threshold,
            window_width=options.adaptive_window,
            min_scene_len=max(1, round(options.adaptive_min_shot_s * self._fps)),
        )
        self._pending: list[np.ndarray] = []
        self._last: np.ndarray | None = None
        self._proposed: list[int] = []
        self._thumbs: list[np.ndarray] = []
        self._similarity: list[np.ndarray] = []
        self._embeddings: list[np.ndarray] = []
        self._embedded_at: list[int] = []
        self._times_s: list[float] = []
        self._damaged: list[int] = []

    def add(self, frame: StreamFrame) -> None:
        """One more frame: feed PySceneDetect, queue for the embedder, keep a 32x18 luma thumbnail."""
        self._times_s.append(frame.time_s)
        if frame.damaged:
            self._damaged.append(frame.index)
        if self._kind == "image":
            return
        bgr = np.ascontiguousarray(frame.small[..., ::-1])
        code = FrameTimecode(frame.index, self._fps)
        self._proposed += [cut.frame_num for cut in self._detector.process_frame(code, bgr)]
        size = _THUMB_SIDES if bgr.shape[1] >= bgr.shape[0] else _THUMB_SIDES[::-1]
        self._thumbs.append(cv2.resize(cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), size, interpolation=cv2.INTER_AREA))
        self._pending.append(frame.small)
        if self._scenes is not None and frame.index % self._stride == 0:
            self._scenes.add(frame)
        if len(self._pending) >= _CHUNK_FRAMES:
            self._embed()

    def _embed(self) -> None:
        if not self._pending:
            return
        first = len(self._times_s) - len(self._pending)
        vectors = self._embedder.embed(np.stack(self._pending))
        before = vectors[:1] if self._last is None else self._last[None]
        self._similarity.append(np.einsum("td,td->t", vectors, np.concatenate([before, vectors[:-1]])))
        if self._scenes is None:
            for offset in range((-first) % self._stride, len(vectors), self._stride):
                self._embeddings.append(vectors[offset].astype(np.float16))
                self._embedded_at.append(first + offset)
        self._last = vectors[-1]
        self._pending = []

    def clips(self) -> list[Row]:
        """The clips of the source in order; shots that are too short are clips as well, for the gates to reject."""
        if self._kind == "image":
            return [{"start_frame": 0, "end_frame": 1, "start_s": 0.0, "end_s": 0.0, "duration_s": 0.0}]
        self._embed()
        n = len(self._times_s)
        similarity = np.concatenate(self._similarity)
        o = self._options
        rules = ShotRules(
            cut_similarity=o.cut_similarity,
            confirm_similarity=o.confirm_similarity,
            scene_cut_similarity=o.scene_cut_similarity,
            scene_confirm_similarity=o.scene_confirm_similarity,
        )
        thumbs = np.stack(self._thumbs)
        cuts = hard_cuts(similarity, self._proposed, rules, thumbs)
        sure = [c for c in cuts if similarity[c] < rules.cut_similarity]
        gradual = gradual_transitions(thumbs, sure, self._fps, rules)
        gaps = _runs(self._damaged)
        if self._scenes is not None:
            self._embedded_at, self._embeddings = self._scenes.finish()
            taken = [(c, c) for c in cuts] + [(t.start, t.end) for t in gradual] + gaps
            at, scenes = self._vectors(0, n)
            cuts = sorted(cuts + scene_cuts(at, scenes, similarity, self._proposed, taken, rules))
        shots = split_shots(n, cuts, gradual, gaps)
        rows: list[Row] = []
        for number, shot in enumerate(shots):
            rows.extend(self._clips_of(number, self._trim(shot)))
        return rows

    def _trim(self, shot: Shot) -> Shot:
        cut = self._options.trim_frames
        soft = ("dissolve", "fade", "blank")
        start = shot.start + (cut if shot.transition_in in soft else 0)
        end = shot.end - (cut if shot.transition_out in soft else 0)
        return shot._replace(start=start, end=end) if end > start else shot

    def _time(self, index: int) -> float:
        """Start of a frame; for the index after the last one, the end of the last."""
        if index < len(self._times_s):
            return self._times_s[index]
        steps = np.diff(self._times_s[-50:])
        return self._times_s[-1] + (float(np.median(steps)) if len(steps) else 1 / self._fps)

    def _clips_of(self, number: int, shot: Shot) -> list[Row]:
        shot_s = self._time(shot.end) - self._time(shot.start)
        spans = [(shot.start, shot.end)]
        if shot_s > self._options.max_s + 0.5 / self._fps:
            spans = self._liveliest_windows(shot)
        return [
            {
                "start_frame": a,
                "end_frame": b,
                "start_s": self._time(a),
                "end_s": self._time(b),
                "duration_s": self._time(b) - self._time(a),
                "segment_shot": number,
                "segment_shot_s": shot_s,
                "segment_transition_in": shot.transition_in,
                "segment_transition_out": shot.transition_out,
                "segment_similarity": self._internal_similarity(a, b),
            }
            for a, b in spans
        ]

    def _vectors(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.array(self._embedded_at)
        low, high = np.searchsorted(at, (start, end))
        return at[low:high], np.array(self._embeddings[low:high], np.float32)

    def _internal_similarity(self, start: int, end: int) -> float | None:
        _, vectors = self._vectors(start, end)
        return mean_pair_similarity(vectors) if len(vectors) >= 2 else None

    def _liveliest_windows(self, shot: Shot) -> list[tuple[int, int]]:
        """Windows of max_s with the lowest internal similarity, without overlap, in order of time."""
        at, vectors = self._vectors(shot.start, shot.end)
        times_s = np.array([self._times_s[i] for i in at])
        last_start_s = self._time(shot.end) - self._options.max_s
        starts = [i for i, t in enumerate(times_s) if t <= last_start_s + 1e-6]
        sums = np.vstack([np.zeros((1, vectors.shape[1])), np.cumsum(vectors, axis=0)])
        scored = []
        for i in starts:
            j = int(np.searchsorted(times_s, times_s[i] + self._options.max_s - 1e-6))
            count = max(2, j - i)
            total = float(np.sum((sums[j] - sums[i]) ** 2))
            scored.append(((total - count) / (count * (count - 1)), i))
        chosen: list[tuple[int, int]] = []
        all_times = np.array(self._times_s)
        # A shot only just too long may begin after the one sample that leaves room: then its first max_s are the window.
        for start in [int(at[i]) for _, i in sorted(scored)] or [shot.start]:
            end = min(shot.end, int(np.searchsorted(all_times, all_times[start] + self._options.max_s - 1e-6)))
            if all(end <= a or start >= b for a, b in chosen):
                chosen.append((start, end))
            if len(chosen) == self._options.max_windows:
                break
        return sorted(chosen)

    def describe(self, clips: Sequence[Row]) -> list[Row]:
        """Nothing beyond what `clips` holds already."""
        return [{} for _ in clips]


def mean_pair_similarity(vectors: np.ndarray) -> float:
    """Mean cosine over all pairs of unit vectors [T, D], in O(T D)."""
    n = len(vectors)
    return float((np.sum(vectors.sum(axis=0) ** 2) - n) / (n * (n - 1)))


def _runs(indexes: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive indexes as [start, end)."""
    runs: list[tuple[int, int]] = []
    for index in indexes:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
