"""Second pass (and any later one that needs pixels): decode the clips that are still wanted and score them together.

Frames are sampled once for all stages of the pass. Before each stage the gates are asked whether any tier can still
keep the clip; if none can, the rest is skipped and stays null.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import groupby, islice
from operator import itemgetter

import cv2
import numpy as np

from curation.gates import rejected_by, tier_gates
from curation.passes import later_passes
from curation.stage import ClipMedia, FrameRequest, Frames, Row, load_stages
from curation.workfolder import WorkFolder
from waver_core.config import Config, digest_of
from waver_core.errors import MediaError, UserError
from waver_core.isolation import isolated
from waver_core.manifest import rows_to_table
from waver_core.telemetry import StageTimer
from waver_core.video import OpenVideo, open_video, quarter_turns, read_image, to_rgb

_MAX_ANCHOR_GAP_S = 0.2
_SAME_TIME_S = 1e-3


class ScoresPass:
    """Built once per worker; called with units of clips, those of one source together and in order of time."""

    def __init__(self, config: Config, work: WorkFolder, name: str) -> None:
        cv2.setNumThreads(1)
        self._config, self._work = config, work
        stages = load_stages(config)
        self.part = next(p for p in later_passes(config, stages) if p.name == name)
        self.stages = self.part.members(stages)
        self._position = {s.name: i for i, s in enumerate(stages.stages)}
        # Gates on columns that were resolved over the whole table (duplicates) were asked before clips came here.
        resolved = {i for i, s in enumerate(stages.stages) if "table" in s.hooks}
        tiers = tier_gates(config, stages)
        self._tiers = {tier: [g for g in gates if g.stage not in resolved] for tier, gates in tiers.items()}
        self._schema = self.part.schema(stages)
        self.requests = sorted({r for s in self.stages for r in s.requests()}, key=str)

    def __call__(self, clips: list[Row]) -> list[Row]:
        """Process a unit: rows of the clip table, each with `bytes` and `anchor_gap_s` of its source. One summary a source."""
        timer = StageTimer()
        out: list[Row] = []
        summaries = []
        by_source = {key: list(group) for key, group in groupby(clips, key=itemgetter("source_id"))}
        for source_id, rows in by_source.items():
            attempt = self._work.begin_attempt(source_id)
            try:
                if attempt > self._config.funnel.max_attempts:
                    raise MediaError("crashes_worker", f"a worker died {attempt - 1} times on this file in one run")
                scored = [row for batch in self._batches(rows, timer) for row in self._score(batch, timer)]
            except UserError:  # a missing package or weight is no fault of the file: stop, and say what mends it
                raise
            except Exception as error:  # decoding failed the second time: an error on every clip of the source
                scored = self._failed(rows, error)
            missing = [r for r in rows if r["clip_id"] not in {s["clip_id"] for s in scored}]
            scored += self._failed(missing, MediaError("no_frames", "no frame of the clip came in the second decode"))
            out.extend(scored)
            summaries.append({"source_id": source_id, "bytes": rows[0]["bytes"], **failures_of(scored)})
        unit = digest_of(sorted(c["clip_id"] for c in clips))
        self._work.commit(self.part.name, unit, rows_to_table(out, self._schema), timer.seconds)
        self._work.end_attempts(by_source)
        return summaries

    def _failed(self, rows: list[Row], error: Exception) -> list[Row]:
        return [{"clip_id": r["clip_id"], **{f"{s.name}_error": error_text(error) for s in self.stages}} for r in rows]

    def _batches(self, rows: list[Row], timer: StageTimer) -> Iterator[list[ClipMedia]]:
        media = self.media(rows, timer)
        while batch := list(islice(media, self.part.resources.clips_per_batch)):
            yield batch

    def _score(self, batch: list[ClipMedia], timer: StageTimer) -> list[Row]:
        """Every stage over the clips that some tier can still keep. Rows are joined to clips by the id they carry."""
        rows: list[Row] = [{"clip_id": media.row["clip_id"]} for media in batch]
        going = list(zip(batch, rows, strict=True))
        for stage in self.stages:
            still = []
            for media, row in going:
                if rejected_by(media.row, self._tiers, self._position[stage.name] - 1) is None:
                    still.append((media, row))
                else:
                    row["skipped_from"] = stage.name
            going = still
            if not going:
                break
            with timer.measure(stage.name):
                results = isolated(stage.score_many, [media for media, _ in going])
            for (media, row), scores in zip(going, results, strict=True):
                # An error is a null with a text, never a score; the other stages go on.
                found = {f"{stage.name}_error": error_text(scores)} if isinstance(scores, Exception) else scores
                row.update(found)
                media.row.update(found)
        return rows

    def media(self, rows: list[Row], timer: StageTimer) -> Iterator[ClipMedia]:
        """Clips of one source, in order of time, with the frames of every request."""
        source = rows[0]
        if source["kind"] == "image":
            with timer.measure(f"decode_{self.part.name}"):
                rgb = read_image(source["source_uri"])
            for row in rows:
                yield ClipMedia(row, {r: Frames(_fit(rgb, r.short_side_px)[None], np.zeros(1)) for r in self.requests})
            return
        # Frames that no other frame needs are the cheapest to leave out; flow allows for uneven steps.
        sparse = self._config.funnel.score_reference_frames_only and (source.get("anchor_gap_s") or 1.0) <= _MAX_ANCHOR_GAP_S
        with open_video(source["source_uri"], threads=self._config.funnel.decode_threads, skip_nonref=sparse) as video:
            yield from sample_clips(video, rows, self.requests, timer, f"decode_{self.part.name}")


def error_text(error: Exception) -> str:
    """What a row says of an error."""
    return f"{type(error).__name__}: {error}"[:500]


def failures_of(rows: list[Row]) -> Row:
    """For a summary: how many rows there are, how many of them have an error, and the first one."""
    errors = [next(((k, v) for k, v in row.items() if k.endswith("_error") and v), None) for row in rows]
    first = next((f"{e[0].removesuffix('_error')}: {e[1]}" for e in errors if e), "")
    return {"items": len(rows), "failed": sum(e is not None for e in errors), "reason": first}


def sample_clips(
    video: OpenVideo,
    rows: list[Row],
    requests: list[FrameRequest],
    timer: StageTimer | None = None,
    timed_as: str = "decode_scores",
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
            with timer.measure(timed_as) if timer else nullcontext():
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
                    with timer.measure(timed_as) if timer else nullcontext():
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
