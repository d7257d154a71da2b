"""Probe, decode and write video with PyAV. Times are seconds from the stream's start, sizes are upright square pixels.

Every reader of pixels in OpenWaver comes through `open_video`, so that rotation, pixel aspect, delayed starts, variable
frame rates and damaged packets are handled in one place.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import av
import av.logging
import cv2
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from waver_core.errors import MediaError
from waver_core.storage import is_local, local_path, open_file, read_bytes
from waver_core.video_writing import Mp4Writer as Mp4Writer
from waver_core.video_writing import write_mp4 as write_mp4
from waver_core.video_writing import write_png as write_png

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv")
# Formats that hold their own pictures. Left out are those that name other files to open (concat, HLS, DASH, SDP, image2).
_DEMUXERS = (
    *("mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "m4v", "h264", "hevc", "flv", "asf", "ogg", "gif", "mxf"),
    *("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe"),
)


_SAME_TIME_S = 1e-3


@dataclass(frozen=True)
class VideoInfo:
    """What container and codec say of the first video stream, before any frame is decoded (rotation excepted)."""

    codec: str
    container: str
    pixel_format: str
    width_px: int
    height_px: int
    pixel_aspect: float
    fps: float
    duration_s: float | None
    bitrate_bps: int | None
    has_audio: bool
    n_video_streams: int
    start_s: float
    """Time of the stream's first frame on the container's own clock; above zero for a delayed start."""


@dataclass(frozen=True)
class Limits:
    """What is refused before a frame of it is decoded, so that one absurd file cannot take a worker down."""

    max_frame_px: int = 8192 * 8192
    max_duration_s: float = 6 * 3600.0


class Frame(NamedTuple):
    """One decoded frame: presentation time, the picture as libav holds it, and whether its references were damaged."""

    time_s: float
    picture: av.VideoFrame
    damaged: bool


@dataclass
class OpenVideo:
    """A video being read forwards. Packets that do not decode are counted, never hidden."""

    info: VideoInfo
    container: Any
    stream: Any
    n_bad_packets: int = 0
    bytes_read: int = 0
    """Size of the video packets so far, from which the true bitrate follows."""
    last_error: str = ""

    def frames(self) -> Iterator[Frame]:
        """Yield frames in presentation order, the stream's start at 0.0 s.

        A packet that does not decode is counted and skipped, as players do; the frames up to the next key frame are
        marked `damaged`, for their references are gone. A container that breaks off ends the iteration.
        """
        packets = self.container.demux(self.stream)
        damaged, index = False, 0
        while True:
            try:
                packet = next(packets, None)
                decoded = [] if packet is None else packet.decode()
            except (av.FFmpegError, OSError) as error:
                if isinstance(error, av.EOFError):
                    return
                self.n_bad_packets += 1
                self.last_error = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
                damaged = True
                if packet is None or self.n_bad_packets > 1000:
                    return
                continue
            if packet is None:
                return
            self.bytes_read += packet.size
            for picture in decoded:
                if picture.key_frame and not picture.is_corrupt:
                    damaged = False
                time_s = picture.time if picture.time is not None else self.info.start_s + index / (self.info.fps or 25.0)
                yield Frame(float(time_s - self.info.start_s), picture, damaged or picture.is_corrupt)
                index += 1

    def skip_to(self, time_s: float) -> None:
        """Move to the last key frame at or before `time_s`; stays where it is when the container cannot seek."""
        with contextlib.suppress(av.FFmpegError):
            offset = int((time_s + self.info.start_s) / self.stream.time_base)
            self.container.seek(offset, stream=self.stream, backward=True)

    def key_frame_times(self) -> list[float]:
        """Times of the key frames that the container's index lists; empty where it has no index."""
        entries = self.stream.index_entries or []
        return [float(e.timestamp * self.stream.time_base) - self.info.start_s for e in entries if e.is_keyframe]


@contextlib.contextmanager
def open_video(
    uri: str, *, threads: int = 1, fast: bool = False, skip_nonref: bool = False, limits: Limits | None = None
) -> Iterator[OpenVideo]:
    """Open the first video stream of a file or URL.

    fast: leave out the in-loop deblocking filter (about a quarter of H.264 decoding); good enough for pictures that are
    shrunk more than fourfold, not for scores of sharpness. skip_nonref: decode reference frames only.
    Raises `MediaError` with reason unreadable, not_media, no_video_stream, too_large or too_long.
    """
    av.logging.set_level(av.logging.PANIC)  # libav's own messages name no file; ours do
    handle = None
    try:
        handle = None if is_local(uri) else open_file(uri)
        # A playlist dressed up as a video must not make libav open other files or addresses.
        options = {"protocol_whitelist": "file", "format_whitelist": ",".join(_DEMUXERS)}
        container = av.open(local_path(uri) if handle is None else handle, mode="r", options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
        if handle is not None:
            handle.close()
        reason = "unreadable" if isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError) else "not_media"
        # libav's last log line, which PyAV appends, may be about another file
        raise MediaError(reason, f"cannot be opened as a video: {getattr(error, 'strerror', None) or error}") from error
    try:
        if not container.streams.video:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise MediaError("no_video_stream", f"has no video stream, only {kinds}")
        stream = container.streams.video[0]
        info = _info(container, stream)
        _check_limits(info, limits or Limits())
        context = stream.codec_context
        context.thread_count = threads
        context.thread_type = "AUTO"
        context.options = {
            **({"skip_loop_filter": "all"} if fast else {}),
            **({"skip_frame": "noref"} if skip_nonref else {}),
        }
        yield OpenVideo(info, container, stream)
    finally:
        container.close()
        if handle is not None:
            handle.close()


def probe(uri: str, limits: Limits | None = None) -> VideoInfo:
    """Read the headers of a video; raises `MediaError` as `open_video` does."""
    with open_video(uri, limits=limits) as video:
        return video.info


def _info(container: Any, stream: Any) -> VideoInfo:
    context = stream.codec_context
    if context is None or not context.width or not context.height:
        raise MediaError("undecodable", "declares no picture size or an unknown codec")
    rate = stream.average_rate or stream.guessed_rate or 0
    time_base = stream.time_base or Fraction(1, 1000)
    duration_s = float(stream.duration * time_base) if stream.duration else None
    if duration_s is None and container.duration:
        duration_s = container.duration / 1e6
    return VideoInfo(
        codec=context.name,
        container=container.format.name,
        pixel_format=str(context.format.name) if context.format else "",
        width_px=context.width,
        height_px=context.height,
        pixel_aspect=float(stream.sample_aspect_ratio or 1) or 1.0,
        fps=float(rate),
        duration_s=duration_s,
        bitrate_bps=int(context.bit_rate or container.bit_rate or 0) or None,
        has_audio=bool(container.streams.audio),
        n_video_streams=len(container.streams.video),
        start_s=float(stream.start_time * time_base) if stream.start_time is not None else 0.0,
    )


def _check_limits(info: VideoInfo, limits: Limits) -> None:
    if info.width_px * info.height_px > limits.max_frame_px:
        raise MediaError("too_large", f"frames of {info.width_px}x{info.height_px} exceed {limits.max_frame_px} pixels")
    if info.duration_s and info.duration_s > limits.max_duration_s:
        raise MediaError("too_long", f"lasts {info.duration_s:.0f} s, more than the limit of {limits.max_duration_s:.0f} s")


def quarter_turns(picture: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns (as `numpy.rot90` counts them) that make a frame upright."""
    if not any(side.type == SideDataType.DISPLAYMATRIX for side in picture.side_data):
        return 0
    return round(picture.rotation / 90) % 4


def display_size_px(width_px: int, height_px: int, pixel_aspect: float, turns: int) -> tuple[int, int]:
    """(width, height) as a player shows it: square pixels, upright."""
    width = round(width_px * pixel_aspect)
    return (height_px, width) if turns % 2 else (width, height_px)


@lru_cache(maxsize=64)
def _reformatter(*key: object) -> VideoReformatter:
    """A scaler that keeps its tables for one kind of job; building them anew for each frame costs more than scaling."""
    return VideoReformatter()


def resize(picture: av.VideoFrame, width_px: int, height_px: int, pixel_format: str = "rgb24", how: str = "") -> np.ndarray:
    """The stored picture (not turned) at another size: uint8 [H, W, 3], or [H, W] for gray.

    how: libswscale's method; by default the area average when the picture shrinks, bilinear when it grows.
    """
    how = how or ("AREA" if width_px < picture.width else "BILINEAR")
    key = (threading.get_ident(), picture.width, picture.height, picture.format.name, width_px, height_px, pixel_format, how)
    array: np.ndarray = _reformatter(*key).reformat(picture, width_px, height_px, pixel_format, interpolation=how).to_ndarray()
    return array


def to_rgb(picture: av.VideoFrame, *, pixel_aspect: float = 1.0, turns: int = 0, short_side_px: int | None = None) -> np.ndarray:
    """An upright uint8 [H, W, 3] RGB picture with square pixels, its short side at most `short_side_px` (never enlarged)."""
    width, height = display_size_px(picture.width, picture.height, pixel_aspect, turns)
    scale = 1.0 if short_side_px is None else min(1.0, short_side_px / min(width, height))
    width, height = max(2, round(width * scale)), max(2, round(height * scale))
    if turns % 2:
        width, height = height, width
    rgb = resize(picture, width, height)
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def decode_frames(
    uri: str, start_s: float = 0.0, end_s: float | None = None, short_side_px: int | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (time_s, uint8 [H, W, 3] RGB) of every frame of a span, upright and with square pixels, one at a time.

    A span takes the frames that begin in [start_s, end_s), times being exact to a millisecond.
    """
    with open_video(uri) as video:
        if start_s > 0:
            video.skip_to(start_s)
        for frame in video.frames():
            if frame.time_s < start_s - _SAME_TIME_S:
                continue
            if end_s is not None and frame.time_s >= end_s - _SAME_TIME_S:
                break
            turns, aspect = quarter_turns(frame.picture), video.info.pixel_aspect
            yield frame.time_s, to_rgb(frame.picture, pixel_aspect=aspect, turns=turns, short_side_px=short_side_px)


def decode(
    uri: str, *, start_s: float = 0.0, end_s: float | None = None, fps: float | None = None, short_side_px: int | None = None
) -> np.ndarray:
    """Decode a span to uint8 [T, H, W, 3] RGB, upright and with square pixels.

    fps: one frame per tick of that rate from `start_s` on, the latest one shown by then (a slower source repeats frames);
    None takes every frame. Raises `MediaError` with reason no_frames when the span holds none.
    """
    frames = list(decode_frames(uri, start_s, end_s, short_side_px)) if not fps else []
    if fps:
        previous: tuple[float, np.ndarray] | None = None
        step_s = 0.0
        for time_s, rgb in decode_frames(uri, start_s, end_s, short_side_px):
            while previous and start_s + len(frames) / fps < time_s - 1e-3:
                frames.append(previous)
            step_s = time_s - previous[0] if previous else 0.0
            previous = (time_s, rgb)
        while previous and start_s + len(frames) / fps < (end_s or previous[0] + step_s) - 1e-3:
            frames.append(previous)
    if not frames:
        raise MediaError("no_frames", f"no frame between {start_s} s and {end_s} s")
    return np.stack([rgb for _, rgb in frames])


def is_image(uri: str) -> bool:
    """True where the name says that it is a still image."""
    return str(uri).lower().endswith(IMAGE_SUFFIXES)


def read_image(uri: str, limits: Limits | None = None) -> np.ndarray:
    """A still image as uint8 [H, W, 3] RGB, turned upright by its EXIF tag. Raises `MediaError` as `open_video` does."""
    try:
        data = np.frombuffer(read_bytes(uri), np.uint8)
    except OSError as error:
        raise MediaError("unreadable", f"cannot be read: {error}") from error
    if not data.size:
        raise MediaError("empty", "is an empty file")
    with open_video(uri, limits=limits):  # refuses absurd sizes from the header, before the pixels are unpacked
        pass
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if picture is None:
        raise MediaError("undecodable", "cannot be decoded as an image")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
