"""Write frames as MP4 and PNG, with what the file says of itself. Reading is `waver_core.video`, which has these names too."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from waver_core.storage import write_atomic

# Key of `metadata` -> libav's name for the atom that players and file managers show, and the keyword of the PNG standard.
_KNOWN_KEYS = {
    "title": ("title", "Title"),
    "artist": ("artist", "Author"),
    "comment": ("comment", "Comment"),
    "description": ("description", "Description"),
    "copyright": ("copyright", "Copyright"),
    "software": ("encoding_tool", "Software"),
}


class Mp4Writer:
    """An H.264 file (yuv420p, index first) that grows by `add`; use it with `with`, which ends the file or, after an error,
    removes it. Odd sizes are cut to even ones, as 4:2:0 needs. The same frames and metadata give the same bytes.

    metadata: title, artist, comment, description, copyright and software are written as all players read them (ffprobe calls
    the last one encoder). Any other key moves all of them to MP4's open list of keys, which ffprobe and exiftool read but
    file managers do not. Of the values, control characters become spaces; empty ones are left out.
    """

    def __init__(
        self,
        path: str,
        *,
        fps: Fraction | int | float,
        crf: int = 18,
        preset: str = "fast",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path, self._rate = str(path), Fraction(fps).limit_denominator(1001)
        # Otherwise x264's AVX-512 code gives other bytes each time, by where its buffers lie, for most small sizes.
        self._codec_options = {"crf": str(crf), "preset": preset, "x264-params": "cpu-independent=1"}
        texts, flags = _texts(metadata or {}), "+faststart"
        if texts.keys() <= _KNOWN_KEYS.keys():
            texts = {_KNOWN_KEYS[key][0]: value for key, value in texts.items()}
        else:
            flags += "+use_metadata_tags"
        self._container = av.open(self._path, "w", format="mp4", options={"movflags": flags})
        self._container.metadata.update(texts)
        self._stream: Any = None
        self._closed = False
        self.count = 0

    def add(self, frame: np.ndarray) -> None:
        """The next frame, uint8 [H, W, 3] RGB."""
        height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
        if self._stream is None:
            stream = self._stream = self._container.add_stream("libx264", rate=self._rate, options=self._codec_options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1  # with more, small pictures come out in other bytes each time
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
        picture.pts, picture.time_base = self.count, 1 / self._rate
        self._container.mux(self._stream.encode(picture))
        self.count += 1

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
            else:
                self._container.close()
        finally:
            if kind is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)

    def close(self) -> None:
        """End the file; nothing happens the second time."""
        if not self._closed:
            self._closed = True
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()


def write_mp4(
    path: str,
    frames: Iterable[np.ndarray],
    *,
    fps: Fraction | int | float,
    crf: int = 18,
    preset: str = "fast",
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write uint8 [H, W, 3] RGB frames as `Mp4Writer` does and return how many there were.

    Nothing is left behind when the frames' iterator raises.
    """
    with Mp4Writer(path, fps=fps, crf=crf, preset=preset, metadata=metadata) as writer:
        for frame in frames:
            writer.add(frame)
    return writer.count


def write_png(path: str, frame: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    """Write one uint8 [H, W, 3] RGB picture, whole or not at all; same picture and metadata, same bytes.

    metadata: keys as for `Mp4Writer`, under PNG's own keywords (Title, Author, ...) where it has them, others as they are.
    Values are Latin-1 (tEXt) or else UTF-8 (iTXt).
    """
    info = PngInfo()
    for key, value in _texts(metadata or {}).items():
        info.add_text(_KNOWN_KEYS[key][1] if key in _KNOWN_KEYS else key, value)
    data = io.BytesIO()
    Image.fromarray(frame, "RGB").save(data, "png", pnginfo=info)
    write_atomic(path, data.getvalue())


def _texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Values that every container holds whole: control characters but tabs and line ends become spaces, halves of surrogate
    pairs question marks. Empty ones are left out."""
    found = {}
    for key, value in metadata.items():
        text = "".join(c if c.isprintable() or c in "\t\n" or ord(c) > 159 else " " for c in value)
        if text:
            found[key] = text.encode("utf-8", "replace").decode()
    return found
