"""Writes synthetic videos and their truth to disk."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from waver_core.synthetic.ground_truth import truth, truth_rows
from waver_core.synthetic.render import render
from waver_core.synthetic.scenes import Video
from waver_core.video import write_mp4

TRUTH_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("file", pa.string()),
        ("media_kind", pa.string()),
        ("readable", pa.bool_()),
        ("exact_duplicate_of", pa.string()),
        ("near_duplicate_of", pa.string()),
        ("n_frames", pa.int64()),
        ("fps", pa.float64()),
        ("width_px", pa.int64()),
        ("height_px", pa.int64()),
        ("row", pa.string()),  # "shot" or "transition"; the columns of the other one are null
        ("start_frame", pa.int64()),
        ("end_frame", pa.int64()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("transition", pa.string()),
        ("camera", pa.string()),
        ("background", pa.string()),
        ("palette", pa.string()),
        ("background_speed_px_per_frame", pa.float64()),
        ("n_shapes", pa.int64()),
        ("colour", pa.string()),  # this and the next four: the first shape
        ("shape", pa.string()),
        ("direction", pa.string()),
        ("world_speed_px_per_frame", pa.float64()),
        ("image_speed_px_per_frame", pa.float64()),
        ("scene_text", pa.string()),
        ("overlays", pa.string()),
        ("defects", pa.string()),
        ("quality_issues", pa.string()),
        ("clean", pa.bool_()),
    ]
)


def write_video(video: Video, path: str | Path) -> dict[str, Any]:
    """Render a video to ``path`` (H.264 in mp4, or a PNG for a still image) and return its truth.

    Raises ValueError when the suffix differs from the one in ``video.file``, or a PNG is asked of several frames.
    """
    path = Path(path)
    if path.suffix != video.file.suffix:
        raise ValueError(f"{path.name}: video {video.name!r} is to be written as {video.file.suffix}")
    known = truth(video)
    path.parent.mkdir(parents=True, exist_ok=True)
    if video.file.suffix == ".png":
        if known["n_frames"] != 1:
            raise ValueError(f"a PNG holds one frame, but {video.name!r} has {known['n_frames']}; shorten its shot")
        cv2.imwrite(str(path), cv2.cvtColor(next(render(video)), cv2.COLOR_RGB2BGR))
        return known
    write_mp4(str(path), render(video), fps=video.fps, crf=video.file.crf, preset="veryfast")
    if video.file.broken:
        path.write_bytes(without_index(path.read_bytes()))
    return known


def without_index(data: bytes) -> bytes:
    """An mp4 as a broken download leaves it: no moov box (the index), and the last third missing. Nothing opens it."""
    kept, at = b"", 0
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        if size == 1:  # a 64-bit size follows
            size = struct.unpack(">Q", data[at + 8 : at + 16])[0]
        end = at + size if size else len(data)
        if kind != b"moov":
            kept += data[at:end]
        at = end
    return kept[: len(kept) * 2 // 3]


def write_collection(
    videos: Sequence[Video],
    directory: str | Path,
    *,
    on_file: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Path:
    """Write the videos, ``truth.parquet`` (a row per shot and transition) and ``truth.jsonl`` (a line per file).

    Returns the directory. ``on_file`` hears of each file once it is there. Raises ValueError before anything is
    written when two names are equal or a copy precedes its original.
    """
    seen: set[str] = set()
    for video in videos:
        if video.name in seen or not video.name:
            raise ValueError(f"names of videos must differ and not be empty: {video.name!r}")
        if video.file.copy_of and video.file.copy_of not in seen:
            raise ValueError(f"{video.name!r} is a copy of {video.file.copy_of!r}, which does not come before it")
        seen.add(video.name)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    known_all = []
    for video in videos:
        path = directory / (video.name + video.file.suffix)
        if video.file.copy_of:
            shutil.copyfile(directory / (video.file.copy_of + video.file.suffix), path)
            known = truth(video)
        else:
            known = write_video(video, path)
        known_all.append(known)
        if on_file is not None:
            on_file(path, known)
    rows = [row for known in known_all for row in truth_rows(known)]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA), directory / "truth.parquet")
    lines = "".join(json.dumps(known) + "\n" for known in known_all)
    (directory / "truth.jsonl").write_text(lines, encoding="utf-8")
    return directory
