"""First pass: decode every frame of a source once; find the clips, and all that can be told of them on the way."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from curation.stage import Row, SourceFacts, StageSet, StreamFrame, load_stages
from curation.stages.segment import SMALL_SHORT_SIDE_PX
from curation.thumbnails import Thumbnails
from curation.workfolder import WorkFolder
from waver_core.config import Config
from waver_core.errors import MediaError, UserError
from waver_core.manifest import clip_id, rows_to_table
from waver_core.storage import write_atomic
from waver_core.telemetry import StageTimer
from waver_core.video import Limits, VideoInfo, open_video, quarter_turns, read_image, resize

_LARGE_SHORT_SIDE_PX = 600


class ShotsPass:
    """Built once per worker; called with units of sources. Results go to the work folder, a summary comes back."""

    def __init__(self, config: Config, work: WorkFolder) -> None:
        cv2.setNumThreads(1)  # parallelism comes from many workers; more threads only fight over the cores
        self._config, self._work = config, work
        self._stages: StageSet = load_stages(config)
        self._ingest = self._stages.named("ingest").options
        self._limits = Limits(self._ingest.max_frame_px, self._ingest.max_duration_s)

    def __call__(self, sources: list[Row]) -> list[Row]:
        """Process a unit. Each source: {source_id, uri, kind, dataset, licence, style, bytes, stamp}."""
        timer = StageTimer()
        finished: list[Row] = []
        rows: list[Row] = []
        for source in sources:
            attempt = self._work.begin_attempt(source["source_id"])
            try:
                if attempt > self._config.funnel.max_attempts:
                    raise MediaError("crashes_worker", f"a worker died {attempt - 1} times on this file in one run")
                record, clips = self._process(source, timer)
            except MediaError as error:
                record, clips = {**source, "status": "quarantined", "reason": error.reason, "error": str(error), "n_clips": 0}, []
            except UserError:  # a missing package or weight is no fault of the file: stop, and say what mends it
                raise
            except Exception as error:  # a bug of ours or a library's must cost one file, not the run
                record = {**source, "status": "quarantined", "reason": "internal_error", "error": repr(error)[:500], "n_clips": 0}
                clips = []
            finished.append(record)
            rows.extend(clips)
        self._work.commit_shots(finished, rows_to_table(rows, self._stages.schema), timer.seconds)
        self._work.end_attempts(s["source_id"] for s in finished)
        return [{"source_id": s["source_id"], "reason": s.get("reason") or "", "bytes": s["bytes"] or 0} for s in finished]

    def _process(self, source: Row, timer: StageTimer) -> tuple[Row, list[Row]]:
        facts, watchers, thumbnails, extra = (self._watch_image if source["kind"] == "image" else self._watch_video)(
            source, timer
        )
        with timer.measure("segment"):
            clips = watchers["segment"].clips()
        for clip in clips:
            clip["clip_id"] = clip_id(source["source_id"], clip["start_frame"], clip["end_frame"])
            clip.update(source_id=source["source_id"], source_uri=source["uri"], kind=facts.kind)
            clip.update({name: source.get(name) for name in ("dataset", "licence", "style")})
        for name, watcher in watchers.items():
            with timer.measure(name):
                for clip, described in zip(clips, watcher.describe(clips), strict=True):
                    clip.update(described)
        with timer.measure("publish"):
            for clip in clips:
                strip = thumbnails.filmstrip(clip)
                clip["thumbnail_frames"] = strip[1] if strip else 0
                if strip:
                    write_atomic(self._work.thumbnail_uri(clip["clip_id"]), strip[0])
        return {**source, "status": "ok", "n_clips": len(clips), **extra}, clips

    def _watch_video(self, source: Row, timer: StageTimer) -> tuple[SourceFacts, dict[str, Any], Thumbnails, Row]:
        with open_video(source["uri"], threads=self._config.funnel.decode_threads, fast=True, limits=self._limits) as video:
            watchers: dict[str, Any] = {}
            index = n_damaged = since_anchor = longest_run = 0
            last_s = 0.0
            frames = video.frames()
            while True:
                with timer.measure("decode_shots"):
                    frame = next(frames, None)
                    if frame is not None:
                        small = small_frame(frame.picture)
                if frame is None:
                    break
                if not watchers:
                    facts = SourceFacts(video.info, "video", quarter_turns(frame.picture))
                    watchers, thumbnails = self._watchers(facts), Thumbnails(facts)
                seen = StreamFrame(index, frame.time_s, small, frame.picture, None, frame.damaged)
                for name, watcher in watchers.items():
                    with timer.measure(name):
                        watcher.add(seen)
                with timer.measure("publish"):
                    thumbnails.add(seen)
                since_anchor = since_anchor + 1 if frame.picture.pict_type == 3 else 0  # 3: a B frame
                longest_run = max(longest_run, since_anchor)
                n_damaged += frame.damaged
                index, last_s = index + 1, frame.time_s
            bad = f"{video.n_bad_packets} damaged packets, last: {video.last_error}" if video.n_bad_packets else ""
            if not index:
                raise MediaError("no_frames", "holds no frame that can be decoded" + (f" ({bad})" if bad else ""))
            if n_damaged > self._ingest.max_damaged_share * index:
                raise MediaError("damaged", f"{n_damaged} of {index} frames lack their references ({bad})")
            if "technical" in watchers:
                watchers["technical"].bytes_read = video.bytes_read
            declared_s = video.info.duration_s or 0.0
            if last_s < declared_s - max(0.3, 0.02 * declared_s):
                bad = f"{bad + '; ' if bad else ''}breaks off at {last_s:.1f} s of {declared_s:.1f} s"
            gap_s = (longest_run + 1) / (video.info.fps or 25.0)
            return (
                facts,
                watchers,
                thumbnails,
                {"note": bad or None, "n_frames": index, "duration_s": last_s, "anchor_gap_s": gap_s},
            )

    def _watch_image(self, source: Row, timer: StageTimer) -> tuple[SourceFacts, dict[str, Any], Thumbnails, Row]:
        with timer.measure("decode_shots"):
            rgb = read_image(source["uri"], self._limits)
        height, width = rgb.shape[:2]
        codec = source["uri"].rsplit(".", 1)[-1].lower()
        info = VideoInfo(codec, codec, "rgb24", width, height, 1.0, 0.0, 0.0, None, False, 1, 0.0)
        facts = SourceFacts(info, "image", 0)
        watchers, thumbnails = self._watchers(facts), Thumbnails(facts)
        scale = SMALL_SHORT_SIDE_PX / min(width, height)
        small = cv2.resize(rgb, (max(2, round(width * scale)), max(2, round(height * scale))), interpolation=cv2.INTER_AREA)
        frame = StreamFrame(0, 0.0, small, None, rgb, False)
        for name, watcher in watchers.items():
            with timer.measure(name):
                watcher.add(frame)
        thumbnails.add(frame)
        return facts, watchers, thumbnails, {"n_frames": 1, "duration_s": 0.0, "anchor_gap_s": 0.0}

    def _watchers(self, facts: SourceFacts) -> dict[str, Any]:
        return {s.name: s.watch(facts) for s in self._stages.with_hook("stream")}


def small_frame(picture: Any) -> np.ndarray:
    """The frame at a short side of 72 px as RGB, as stored (not turned): what the watchers of every frame see.

    Averaging every pixel of a large frame costs as much as decoding it, so those are sampled down to twice the size first.
    """
    short_side_px = min(picture.width, picture.height)
    size = tuple(max(2, round(side * SMALL_SHORT_SIDE_PX / short_side_px)) for side in (picture.width, picture.height))
    if short_side_px < _LARGE_SHORT_SIDE_PX:
        return resize(picture, *size)
    double = resize(picture, 2 * size[0], 2 * size[1], how="FAST_BILINEAR")
    return cv2.resize(double, size, interpolation=cv2.INTER_AREA)
