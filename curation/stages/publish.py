"""Publish (Waver §3.5): the clip table, one manifest per tier, and clip files if they are wanted."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import av
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation import stage
from curation.balance import Balance
from waver_core import storage
from waver_core.config import Strict
from waver_core.errors import ConfigError, did_you_mean
from waver_core.manifest import Column, publish
from waver_core.video import decode_frames, open_video, write_mp4


class Options(Strict):
    """What is written at the end."""

    rows_per_shard: int = Field(1_000_000, ge=1)
    clip_files: Literal["none", "copy", "encode"] = "none"
    """Write the clips of `clip_tier` as files: `copy` stream-copies where a clip begins on a key frame, else re-encodes."""
    clip_tier: str = "192p"
    clip_crf: int = Field(16, ge=0, le=51)
    max_gallery_clips: int = Field(400, ge=0)


class Stage(stage.Stage):
    """Writes what the run leaves behind."""

    name = "publish"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("publish",)
    columns = (
        Column("training_caption", pa.string(), "caption between the words for its style and those for its quality"),
        Column("thumbnail_frames", pa.int32(), "frames in the clip's filmstrip; 0 where there is none"),
        Column("skipped_from", pa.string(), "stage from which on this clip was not scored, as every tier had rejected it"),
    )

    def check_tiers(self, tiers: Sequence[str]) -> None:
        """Raises `ConfigError` when clip files are wanted of a tier that there is not."""
        if self.options.clip_files != "none" and self.options.clip_tier not in tiers:
            near = did_you_mean(self.options.clip_tier, tiers)
            raise ConfigError(f"funnel.stages.publish.clip_tier: no tier '{self.options.clip_tier}': {near}")

    def write_clips(self, output: str, clips: pa.Table, facts: dict[str, Any]) -> None:
        """Write `<output>/clips`: every clip, the rejected ones included."""
        publish(storage.join(output, "clips"), clips, rows_per_shard=self.options.rows_per_shard, facts=facts)

    def write_tiers(self, output: str, clips: pa.Table, tiers: list[str], balance: Balance | None, facts: dict[str, Any]) -> None:
        """Write `<output>/tiers/<tier>`: the clips each keeps, with their sampling weights."""
        verdicts = [*(f"reason_{t}" for t in tiers), "reject_reason", "reject_stage", "skipped_from"]
        dropped = [*verdicts, "dedup_hashes", "dedup_embedding"]
        for tier in tiers:
            kept = clips.filter(pc.is_null(clips[f"reason_{tier}"]))
            if balance is not None:
                index = kept.schema.get_field_index("sampling_weight")
                kept = kept.set_column(index, kept.schema.field(index), balance.weight_of(tier, kept))
            kept = kept.drop_columns([c for c in dropped if c in kept.column_names])
            folder = storage.join(output, "tiers", tier)
            publish(folder, kept, rows_per_shard=self.options.rows_per_shard, facts={**facts, "tier": tier})

    def write_clip_file(self, clip: dict[str, Any], uri: str) -> str:
        """Write one clip as MP4; returns `copied` or `encoded`. Raises `MediaError` when its source cannot be read.

        A stream copy starts on a key frame or not at all: where the clip's first frame is none, it is re-encoded.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/clip.mp4"
            how = "copied" if self.options.clip_files == "copy" and _stream_copy(clip, path) else "encoded"
            if how == "encoded":
                frames = (frame for _, frame in decode_frames(clip["source_uri"], clip["start_s"], clip["end_s"]))
                write_mp4(path, frames, fps=clip["fps"], crf=self.options.clip_crf)
            storage.write_atomic(uri, storage.read_bytes(path))
        return how


def _stream_copy(clip: dict[str, Any], path: str) -> bool:
    """Copy the video packets of a clip; False where that would not give exactly its frames (then the file is no use).

    Exact means: the clip begins on a key frame, ends before one or at the end of the stream, and the packets between hold
    as many frames as the clip (an open group of pictures does not).
    """
    with open_video(clip["source_uri"]) as video:
        half_frame_s = 0.5 / (video.info.fps or 25.0)
        if clip["technical_rotation_deg"] or not any(abs(t - clip["start_s"]) < half_frame_s for t in video.key_frame_times()):
            return False
        video.skip_to(clip["start_s"] + half_frame_s)
        copied, offset = 0, None
        with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as out:
            try:
                stream = out.add_stream_from_template(video.stream)
            except (ValueError, av.FFmpegError):  # a codec that MP4 does not hold
                return False
            for packet in video.container.demux(video.stream):
                if packet.pts is None or packet.dts is None:
                    continue
                time_s = float(packet.pts * packet.time_base) - video.info.start_s
                if time_s >= clip["end_s"] - half_frame_s:
                    if packet.is_keyframe:
                        break
                    return False
                if time_s < clip["start_s"] - half_frame_s:
                    if offset is None:
                        continue
                    return False
                offset = packet.dts if offset is None else offset
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, stream
                out.mux(packet)
                copied += 1
    return copied == clip["end_frame"] - clip["start_frame"]
