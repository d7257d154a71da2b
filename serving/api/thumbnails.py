"""The first frame of a result as a PNG."""

from __future__ import annotations

import io

import av
from PIL import Image

from serving.api.files import OpenFile


def first_frame_png(opened: OpenFile) -> bytes:
    """Decode one frame of a video of our own making, and close the file. Blocks."""
    with opened.file, av.open(opened.file, mode="r", format="mp4") as container:
        frame = next(container.decode(video=0))
        file = io.BytesIO()
        Image.fromarray(frame.to_ndarray(format="rgb24")).save(file, "PNG")
    return file.getvalue()
