"""PNG, JPEG and WebP files walked from their first byte to their last, before any decoder sees them.

A walk finds the size of the picture, that nothing follows its end, that nothing is missing, and what else the file carries:
so a file that is a picture to one program and an archive or a page to another is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SIGNATURES = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
_OTHERS = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"<svg", "an SVG"),
    (b"<?xml", "an SVG or other XML"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
)
_ALIEN = (
    *(b"PK\x03\x04", b"PK\x05\x06", b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c", b"%PDF-"),
    *(b"<?php", b"<script", b"<html", b"<!doctype", b"<svg"),
)
"""Beginnings of other files; in a picture's own data they would be pure chance, in its notes they are no accident."""
_MAX_PARTS = 20_000
_MAX_SCANS = 64
"""Of a progressive JPEG, which has about ten. Each is a walk of the decoder over the whole picture, and costs thirty bytes."""


class BadPicture(Exception):
    """Not a picture that is taken; the message says why, and follows the field's name."""


@dataclass(frozen=True)
class Container:
    """What the walk found."""

    format: str
    width_px: int
    height_px: int
    data: bytes
    """The file without the parts that are not needed to show it."""


def walk(data: bytes) -> Container:
    """Check a whole file. Raises `BadPicture`."""
    if data.startswith(SIGNATURES["PNG"]):
        return _walk_png(data)
    if data.startswith(SIGNATURES["JPEG"]):
        return _walk_jpeg(data)
    if data.startswith(SIGNATURES["WEBP"]) and data[8:12] == b"WEBP":
        return _walk_webp(data)
    head = data[:64].lstrip().lower()
    what = next((name for magic, name in _OTHERS if head.startswith(magic.lower())), "no picture that is known here")
    raise BadPicture(f"is {what}: send PNG, JPEG or WebP")


def _truncated() -> BadPicture:
    return BadPicture("breaks off in the middle: send the whole file")


def _require_end(end: int, data: bytes) -> None:
    if end < len(data):
        raise BadPicture(f"has {len(data) - end} bytes after the picture's end: save it anew as a plain picture")


def _require_plain(notes: bytes) -> None:
    """Notes are text, colour profiles, camera data: anything but the pixels."""
    low = notes.lower()
    if any(mark.lower() in low for mark in _ALIEN):
        raise BadPicture("carries another file inside: save it anew without metadata")


def _walk_png(data: bytes) -> Container:
    """Signature, then chunks of length, type, data and CRC from IHDR to IEND."""
    kept, width, height = [SIGNATURES["PNG"]], 0, 0
    seen_pixels = False
    for index, (kind, body, chunk) in enumerate(_png_chunks(data)):
        if (kind == b"IHDR") != (index == 0) or index > _MAX_PARTS:
            raise BadPicture("is no well-formed PNG: save it anew")
        if kind == b"IHDR":
            if len(body) != 13:
                raise BadPicture("is no well-formed PNG: save it anew")
            width, height = int.from_bytes(body[:4]), int.from_bytes(body[4:8])
        elif kind in (b"acTL", b"fcTL", b"fdAT"):
            raise BadPicture("is an animated PNG: send a still picture")
        elif kind not in (b"IDAT", b"PLTE", b"tRNS", b"IEND"):
            _require_plain(body)
        seen_pixels = seen_pixels or kind == b"IDAT"
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"):
            kept.append(chunk)
    if not seen_pixels:
        raise BadPicture("is a PNG without pixels: save it anew")
    return Container("PNG", width, height, b"".join(kept))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(type, body, the whole chunk) up to IEND, which must be the last."""
    at = 8
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            break
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise BadPicture("is a damaged PNG: a checksum is wrong, send it again")
        yield kind, data[at + 8 : end - 4], data[at:end]
        at = end
        if kind == b"IEND":
            _require_end(at, data)
            return
    raise _truncated()


def _walk_jpeg(data: bytes) -> Container:
    """Markers from SOI to EOI; the entropy-coded data behind each SOS is skipped to the next marker."""
    at, width, height, scans = 2, 0, 0, 0
    notes: list[bytes] = []
    for _ in range(_MAX_PARTS):
        while data[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if at + 2 > len(data):
            raise _truncated()
        if data[at] != 0xFF:
            raise BadPicture("is no well-formed JPEG: save it anew")
        marker = data[at + 1]
        at += 2
        if marker == 0xD9:
            _require_end(at, data)
            if not width or not height:
                raise BadPicture("is a JPEG without pixels: save it anew")
            _require_plain(b"\0".join(notes))
            return Container("JPEG", width, height, data)
        length = int.from_bytes(data[at : at + 2])
        end = at + length
        if length < 2 or end > len(data):
            raise _truncated()
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if width:
                raise BadPicture("holds more than one picture: save it anew")
            height, width = int.from_bytes(data[at + 3 : at + 5]), int.from_bytes(data[at + 5 : at + 7])
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            notes.append(data[at + 2 : end])
        scans += marker == 0xDA
        if scans > _MAX_SCANS:
            raise BadPicture(f"is a JPEG of more than {_MAX_SCANS} scans: save it anew")
        at = _after_scan(data, end) if marker == 0xDA else end
    raise BadPicture("is no well-formed JPEG: save it anew")


def _after_scan(data: bytes, at: int) -> int:
    """Where the next real marker stands: FF00 is a byte of data, FFD0 to FFD7 only restart the coder."""
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            raise _truncated()
        after = data[at + 1]
        if after == 0xFF:
            at += 1
        elif after == 0x00 or 0xD0 <= after <= 0xD7:
            at += 2
        else:
            return at


def _walk_webp(data: bytes) -> Container:
    """RIFF with the size of all that follows, then chunks; VP8, VP8L or VP8X say the picture's size."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise _truncated()
    _require_end(end, data)
    at, size, pixels = 12, (0, 0), 0
    while at + 8 <= end:
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + length]
        if at + 8 + length > end:
            raise _truncated()
        if kind in (b"ANIM", b"ANMF") or (kind == b"VP8X" and body[:1] and body[0] & 2):
            raise BadPicture("is an animated WebP: send a still picture")
        if kind in (b"VP8 ", b"VP8L"):
            pixels += 1
            size = max(size, _webp_size(kind, body))
        elif kind == b"VP8X" and len(body) >= 10:
            size = max(size, (1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")))
        elif kind != b"ALPH":
            _require_plain(body)
        at += 8 + length + length % 2
    if pixels != 1 or not all(size):
        raise BadPicture("is no well-formed WebP: save it anew")
    return Container("WEBP", *size, data)


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise BadPicture("is no well-formed WebP: save it anew")
