"""Shared fixtures: small videos that are rendered once a session, and a writer of odd files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from waver_core.synthetic import Video, write_video
from waver_core.synthetic.render import render
from waver_core.video import open_video, resize

# The same examples on every run and machine, and no folder left behind.
settings.register_profile(
    "house", derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")
cv2.setNumThreads(1)

CORNER_PX = 16


def counted_frame(k: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frame k says its number by its grey level (40 + 4 k) and which way is up by its corners: red green / blue white."""
    frame = np.full((height, width, 3), 40 + 4 * k, np.uint8)
    c = CORNER_PX
    frame[:c, :c], frame[:c, -c:], frame[-c:, :c], frame[-c:, -c:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    return frame


def write_frames(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    fps: Fraction | int = 24,
    pts: Sequence[int] | None = None,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container: str = "mp4",
) -> str:
    """Write H.264 with whatever timestamps, pixel aspect and encoder options a test needs; pts count in 1/fps."""
    rate = Fraction(fps)
    output = av.open(str(path), "w", format=container, options={"movflags": "+faststart"} if container == "mp4" else {})
    with output:
        stream = output.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "ultrafast", **(options or {})})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = 1 / rate
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for k, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = (pts[k] if pts is not None else k), 1 / rate
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    return str(path)


@pytest.fixture(scope="session")
def make_video() -> Callable[..., str]:
    """`make_video(path, frames, ...)`: see `write_frames`."""
    return write_frames


@pytest.fixture(scope="session")
def make_frame() -> Callable[..., np.ndarray]:
    """`make_frame(k)`: see `counted_frame`."""
    return counted_frame


@pytest.fixture(scope="session")
def counted_mp4(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 counted frames at 24 fps, a key frame every 12, no B frames."""
    path = tmp_path_factory.mktemp("counted") / "counted.mp4"
    return write_frames(path, [counted_frame(k) for k in range(48)], options={"g": "12", "bf": "0", "keyint_min": "12"})


@dataclass
class Rendered:
    """A synthetic video on disk, what is known of it, and its frames as the first pass sees them (short side 72 px)."""

    video: Video
    uri: str
    known: dict[str, Any]
    small: np.ndarray = field(repr=False)

    def ends(self, kind: str) -> list[tuple[int, int]]:
        """(start, end) of the transitions of one kind."""
        return [(t["start_frame"], t["end_frame"]) for t in self.known["transitions"] if t["kind"] == kind]


@pytest.fixture(scope="session")
def render_to_disk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Video], Rendered]:
    """Write a synthetic video and read it back at 72 px."""
    folder = tmp_path_factory.mktemp("rendered")

    def write(video: Video) -> Rendered:
        path = folder / f"{video.name}.mp4"
        known = write_video(video, path)
        small = []
        with open_video(str(path), fast=True) as opened:
            for frame in opened.frames():
                scale = 72 / min(frame.picture.width, frame.picture.height)
                small.append(resize(frame.picture, round(frame.picture.width * scale), round(frame.picture.height * scale)))
        return Rendered(video, str(path), known, np.stack(small))

    return write


@pytest.fixture(scope="session")
def frames_of() -> Callable[[Video], np.ndarray]:
    """A synthetic video's frames uint8 [T, H, W, 3], without a file."""
    return lambda video: np.stack(list(render(video)))
