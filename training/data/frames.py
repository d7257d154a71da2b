"""A sample's row -> its pixels: the right frames of the right clip, without bars, at the size that is encoded (Waver §4.1).

Frames are those nearest in time to the ticks of the sampling rate, so a source with a variable rate keeps its pace. They are
cropped to the picture inside black bars, then to the wanted aspect ratio around the middle, then shrunk by area averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from waver_core.errors import MediaError
from waver_core.video import Frame, OpenVideo, open_video, quarter_turns, read_image, to_rgb

_SAME_TIME_S = 1e-3
_TIE_S = 1e-6
"""Of two frames equally near, rounding must not choose: the earlier one is taken."""


def read_frames(row: Mapping[str, Any]) -> np.ndarray:
    """The frames of a row of the sample table: uint8 [frames, height_px, width_px, 3].

    `active_box` (left, top, right, bottom in px of the picture as displayed) may be missing or null. Raises `MediaError` where
    the file is gone or broken, ends too early, is damaged within the sample, or is not of the size that the box is for.
    """
    height_px, width_px, box = row["height_px"], row["width_px"], row.get("active_box")
    if row["kind"] == "image":
        return np.ascontiguousarray(fit(read_image(row["source_uri"]), box, height_px, width_px))[None]
    frames = np.empty((row["frames"], height_px, width_px, 3), np.uint8)
    with open_video(row["source_uri"]) as video:
        previous: Frame | None = None
        size_px: tuple[int, ...] | None = None
        for k, frame in enumerate(frames_at(video, row["start_s"], row["fps"], row["frames"])):
            if frame is previous:
                frames[k] = frames[k - 1]
                continue
            if frame.damaged:
                raise MediaError("damaged", f"is damaged at {frame.time_s:.2f} s")
            picture = to_rgb(frame.picture, pixel_aspect=video.info.pixel_aspect, turns=quarter_turns(frame.picture))
            if size_px not in (None, picture.shape):
                raise MediaError("size_changed", f"changes its picture size at {frame.time_s:.2f} s")
            frames[k], previous, size_px = fit(picture, box, height_px, width_px), frame, picture.shape
    return frames


def frames_at(video: OpenVideo, start_s: float, fps: float, count: int) -> Iterator[Frame]:
    """The decoded frames nearest to start_s, start_s + 1/fps, ...: `count` of them; the same object again where one repeats.

    Only frames that begin in [start_s, start_s + count/fps) are taken, so that none of a neighbouring shot slips in. Raises
    `MediaError` with reason too_short where the video ends before the last one is due.
    """
    end_s = start_s + count / fps
    if start_s > 0:
        video.skip_to(start_s)
    taken, step_s, ended = 0, 0.0, True
    last: Frame | None = None
    for frame in video.frames():
        if frame.time_s < start_s - _SAME_TIME_S:
            continue
        if frame.time_s >= end_s - _SAME_TIME_S:
            ended = False
            break
        if last is not None:
            step_s = frame.time_s - last.time_s
            while taken < count and (due_s := start_s + taken / fps) - last.time_s <= frame.time_s - due_s + _TIE_S:
                yield last
                taken += 1
        if taken == count:
            return
        last = frame
    while last is not None and taken < count:
        late_s = start_s + taken / fps - last.time_s
        if ended and late_s > max(1 / fps, step_s) + _SAME_TIME_S:
            break
        yield last
        taken += 1
    if taken < count:
        why = f", {video.last_error}" if video.last_error else ""
        found = f"ends after {last.time_s:.2f} s" if last is not None else "has no frame there"
        raise MediaError("too_short", f"{found}, but {count} frames from {start_s:.2f} s at {fps:g} fps are wanted{why}")


def fit(picture: np.ndarray, box: Sequence[int] | None, height_px: int, width_px: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [height_px, width_px, 3]: the box, of it the middle in the wanted aspect ratio, resized.

    Shrinks by area averages and enlarges bicubically. Raises `MediaError` where the box does not lie in the picture.
    """
    height, width = picture.shape[:2]
    left, top, right, bottom = box if box is not None else (0, 0, width, height)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise MediaError("size_changed", f"is of {width}x{height} px, where its active box {list(box or ())} does not fit")
    scale = max(height_px / (bottom - top), width_px / (right - left))
    rows, columns = min(bottom - top, round(height_px / scale)), min(right - left, round(width_px / scale))
    y, x = top + (bottom - top - rows) // 2, left + (right - left - columns) // 2
    crop = picture[y : y + rows, x : x + columns]
    if crop.shape[:2] == (height_px, width_px):
        return crop
    return cv2.resize(crop, (width_px, height_px), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
