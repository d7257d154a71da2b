"""Given frames: any bytes a stranger may send in, a plain PNG of known size out, or a refusal."""

from __future__ import annotations

import base64
import binascii
import io
import logging
import re

from PIL import ExifTags, Image, UnidentifiedImageError

from serving.api.containers import BadPicture, walk
from serving.api.errors import ApiError

MIN_SIDE_PX = 16
MAX_SIDE_PX = 16_384
_DATA_URL = re.compile(r"data:(?:image/[a-z0-9.+-]{1,40})?(?:;[a-z0-9=_.-]{1,40})?;base64,", re.IGNORECASE)
_PNG_EFFORT = 1
"""Of zlib: the file is read once and deleted."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it."""
_OF_DECODERS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError, OverflowError)
_log = logging.getLogger("waver.http")


def decode_base64(text: str, param: str, max_bytes: int) -> bytes:
    """The bytes of base64 text or of a data URL. Raises `ApiError` 400."""
    head = _DATA_URL.match(text[:128])
    if head is None and ":" in text[:32]:
        message = f"{param} is neither base64, nor a data URL, nor an https URL: send one of them."
        raise ApiError(400, "bad_image", message, param=param)
    payload = text[head.end() :] if head else text
    if len(payload) * 3 // 4 > max_bytes + 3:
        raise _too_large(param, max_bytes)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "bad_image", f"{param} is no valid base64: encode the picture anew.", param=param) from None


def to_png(data: bytes, param: str, *, max_bytes: int, max_px: int) -> bytes:
    """Check a picture and save it anew: PNG, RGB, upright, over white where it was transparent, without any metadata.

    Raises `ApiError` 400 `bad_image` or `image_too_large`, and 413 `file_too_large`. Nothing is decoded before the file's
    structure and the size in its header are known to be right, and of a PNG the decoder sees only what makes up the picture.
    """
    if len(data) > max_bytes:
        raise _too_large(param, max_bytes)
    try:
        found = walk(data)
        width, height = found.width_px, found.height_px
        if width * height > max_px or max(width, height) > MAX_SIDE_PX:
            message = f"{param} has {width}x{height} px: at most {max_px} pixels and {MAX_SIDE_PX} px a side are taken."
            raise ApiError(400, "image_too_large", message, param=param)
        if min(width, height) < MIN_SIDE_PX:
            raise BadPicture(f"has {width}x{height} px: at least {MIN_SIDE_PX} px a side are needed")
        with Image.open(io.BytesIO(found.data), formats=[found.format]) as image:
            if image.size != (width, height) or getattr(image, "n_frames", 1) != 1:
                raise BadPicture("says two things about its size: save it anew")
            return _plain(image)
    except BadPicture as error:
        raise ApiError(400, "bad_image", f"{param} {error}.", param=param) from None
    except ApiError:
        raise
    except Exception as error:  # decoders meet strangers' bytes with errors of every kind
        if not isinstance(error, _OF_DECODERS):
            _log.warning("a picture of %d bytes was refused: %r", len(data), error)
        raise ApiError(400, "bad_image", f"{param} cannot be decoded: save it anew.", param=param) from None


def _plain(image: Image.Image) -> bytes:
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    upright: Image.Image = image if turn is None else image.transpose(turn)
    if upright.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off instead of scaling
        upright = upright.point(lambda value: value / 257).convert("L")
    if upright.has_transparency_data:
        over = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    rgb = upright.convert("RGB")
    clean = Image.new("RGB", rgb.size)  # has none of the old one's metadata
    clean.paste(rgb)
    file = io.BytesIO()
    clean.save(file, "PNG", compress_level=_PNG_EFFORT)
    return file.getvalue()


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where the EXIF data does not say or cannot be read. Pillow's own `exif_transpose` writes the data
    anew as well, which fails for what some cameras put into it."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:
        _log.info("EXIF data that cannot be read: %r", error)
        return 1
    return found if isinstance(found, int) else 1


def _too_large(param: str, max_bytes: int) -> ApiError:
    return ApiError(413, "file_too_large", f"{param} is larger than {max_bytes / 1e6:g} MB: send a smaller picture.", param=param)
