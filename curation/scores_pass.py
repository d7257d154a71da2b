"""Second pass: decode the clips that are still wanted once more and score them with every stage together.

Frames are sampled once for all stages. Before each stage the gates are asked whether any tier can still keep the clip;
if none can, the rest is skipped and stays null.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from curation.gates import rejected_by, tier_gates
from curation.stage import ClipMedia, FrameRequest, Frames, Row, StageSet, load_stages
from curation.workfolder import WorkFolder
from waver_core.config import Config, digest_of
from waver_core.errors import MediaError, UserError
from waver_core.manifest import rows_to_table
from waver_core.telemetry import StageTimer
from waver_core.video import OpenVideo, open_video, quarter_turns, read_image, to_rgb

_MAX_ANCHOR_GAP_S = 0.2
_SAME_TIME_S = 1e-3


def score_schema(stages: StageSet) -> pa.Schema:
    """Columns that the second pass writes: id, those of all clip stages, and whether it stopped early."""
    owners = {s.name for s in stages.with_hook("clip")}
    stream = {name for s in stages.with_hook("stream") for name in _stream_columns(s)}
    fields = [f for f in stages.schema if (f.metadata or {}).get(b"owner", b"").decode() in owners and f.name not in stream]
    return pa.schema([("clip_id", pa.string()), *fields, ("skipped_from", pa.string())])


def _stream_columns(stage: Any) -> set[str]:
    """Columns of a clip stage that the first pass fills already: those named `<stage>_source_*`."""
    return {c.name for c in stage.columns if c.name.startswith(f"{stage.name}_source_")}


class ScoresPass:
    """Built once per worker; called with units of sources and the clips wanted of each."""

    def __init__(self, config: Config, work: WorkFolder) -> None:
        cv2.setNumThreads(1)
        self._config, self._work = config, work
        self._stages = load_stages(config)
        self._clip_stages = self._stages.with_hook("clip")
        # Gates on columns that were resolved over the whole table (duplicates) were asked before clips came here.
        resolved = {i for i, s in enumerate(self._stages.stages) if "table" in s.hooks}
        tiers = tier_gates(config, self._stages)
        self._tiers = {tier: [g for g in gates if g.stage not in resolved] for tier, gates in tiers.items()}
        self._schema = score_schema(self._stages)
        self._requests = sorted({r for s in self._clip_stages for r in s.requests()}, key=str)

    def __call__(self, sources: list[Row]) -> list[Row]:
        """Process a unit. Each source: {source_id, uri, kind, unit, anchor_gap_s, clip_ids}."""
        timer = StageTimer()
        clips = self._work.read_clips([s["unit"] for s in sources], self._stages.schema).to_pylist()
        out: list[Row] = []
        summaries = []
        for source in sources:
            wanted = set(source["clip_ids"])
            rows = sorted((c for c in clips if c["clip_id"] in wanted), key=lambda c: c["start_s"])
            attempt = self._work.begin_attempt(source["source_id"])
            try:
                if attempt > self._config.funnel.max_attempts:
                    raise MediaError("crashes_worker", f"a worker died {attempt - 1} times on this file in one run")
                scored = [self._score(media, timer) for media in self._media(source, rows, timer)]
            except UserError:  # a missing package or weight is no fault of the file: stop, and say what mends it
                raise
            except Exception as error:  # decoding failed the second time: an error on every clip of the source
                scored = self._failed(rows, error)
            missing = [r for r in rows if r["clip_id"] not in {s["clip_id"] for s in scored}]
            scored += self._failed(missing, MediaError("no_frames", "no frame of the clip came in the second decode"))
            out.extend(scored)
            failed = next(((k, v) for s in scored for k, v in s.items() if k.endswith("_error") and v), None)
            reason = f"{failed[0].removesuffix('_error')}: {failed[1]}" if failed else ""
            summaries.append({"source_id": source["source_id"], "reason": reason, "bytes": source["bytes"]})
        unit = digest_of(sorted((s["source_id"], *sorted(s["clip_ids"])) for s in sources))
        self._work.commit_scores(unit, rows_to_table(out, self._schema), timer.seconds)
        self._work.end_attempts(s["source_id"] for s in sources)
        return summaries

    def _failed(self, rows: list[Row], error: Exception) -> list[Row]:
        text = f"{type(error).__name__}: {error}"[:500]
        return [{"clip_id": r["clip_id"], **{f"{s.name}_error": text for s in self._clip_stages}} for r in rows]

    def _score(self, media: ClipMedia, timer: StageTimer) -> Row:
        row: Row = {"clip_id": media.row["clip_id"]}
        position = {s.name: i for i, s in enumerate(self._stages.stages)}
        for stage in self._clip_stages:
            if rejected_by(media.row, self._tiers, position[stage.name] - 1) is not None:
                row["skipped_from"] = stage.name
                break
            try:
                with timer.measure(stage.name):
                    scores = stage.score(media)
            except UserError:
                raise
            except Exception as error:  # an error is a null with a text, never a score; the other stages go on
                scores = {f"{stage.name}_error": f"{type(error).__name__}: {error}"[:500]}
            row.update(scores)
            media.row.update(scores)
        return row

    def _media(self, source: Row, rows: list[Row], timer: StageTimer) -> Iterator[ClipMedia]:
        if source["kind"] == "image":
            with timer.measure("decode_scores"):
                rgb = read_image(source["uri"])
            for row in rows:
                yield ClipMedia(row, {r: Frames(_fit(rgb, r.short_side_px)[None], np.zeros(1)) for r in self._requests})
            return
        # Frames that no other frame needs are the cheapest to leave out; flow allows for uneven steps.
        sparse = self._config.funnel.score_reference_frames_only and (source.get("anchor_gap_s") or 1.0) <= _MAX_ANCHOR_GAP_S
        with open_video(source["uri"], threads=self._config.funnel.decode_threads, skip_nonref=sparse) as video:
            yield from sample_clips(video, rows, self._requests, timer)


def sample_clips(
    video: OpenVideo, rows: list[Row], requests: list[FrameRequest], timer: StageTimer | None = None
) -> Iterator[ClipMedia]:
    """One forward decode through clips in order of time; seeks only over gaps that hold a key frame."""
    key_times_s = np.array(video.key_frame_times())
    half_frame_s = 0.5 / (video.info.fps or 25.0)
    frames, now_s = video.frames(), -1.0
    held = None
    for row in rows:
        before = key_times_s[key_times_s <= row["start_s"] + 1e-6]
        if len(before) and before[-1] > now_s + 1.0:
            video.skip_to(row["start_s"])
            frames, held = video.frames(), None
        targets = {r: r.times_s(row["start_s"], row["end_s"]) for r in requests}
        taken: dict[FrameRequest, list[tuple[float, np.ndarray]]] = {r: [] for r in requests}
        while True:
            with timer.measure("decode_scores") if timer else nullcontext():
                frame = held if held is not None else next(frames, None)
            held = None
            if frame is None:
                break
            now_s = frame.time_s
            if now_s < row["start_s"] - _SAME_TIME_S:
                continue
            if now_s >= row["end_s"] - _SAME_TIME_S:
                held = frame
                break
            turns = quarter_turns(frame.picture)
            for request, times in targets.items():
                have = taken[request]
                if len(have) < len(times) and now_s >= times[len(have)] - half_frame_s:
                    with timer.measure("decode_scores") if timer else nullcontext():
                        rgb = to_rgb(
                            frame.picture, pixel_aspect=video.info.pixel_aspect, turns=turns, short_side_px=request.short_side_px
                        )
                    while len(have) < len(times) and now_s >= times[len(have)] - half_frame_s:
                        have.append((now_s, rgb))
        if all(taken.values()):
            yield ClipMedia(row, {r: _frames(taken[r], len(targets[r])) for r in requests})


def _frames(taken: list[tuple[float, np.ndarray]], wanted: int) -> Frames:
    """Stack sampled frames; where the source ran out, the last one stands in (same time, so flow ignores it)."""
    filled = taken + [taken[-1]] * (wanted - len(taken))
    return Frames(np.stack([rgb for _, rgb in filled]), np.array([t for t, _ in filled]))


def _fit(rgb: np.ndarray, short_side_px: int) -> np.ndarray:
    scale = min(1.0, short_side_px / min(rgb.shape[:2]))
    if scale == 1.0:
        return rgb
    return cv2.resize(rgb, (round(rgb.shape[1] * scale), round(rgb.shape[0] * scale)), interpolation=cv2.INTER_AREA)
