"""Reading bodies: never more than the cap, JSON without surprises, multipart in few and small parts."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import anyio
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serving.api.errors import ApiError

MAX_PARTS = 40
MAX_NAME_BYTES = 100
IDLE_S = 30.0
"""A body of which nothing comes for so long is given up."""
WHOLE_S = 600.0
"""A body that has not come whole after this is given up: drop by drop, it would hold its memory for days."""
MAX_BETWEEN_BYTES = 65_536
"""Bytes of JSON outside of texts. A request has some hundred; 32 MB of brackets would make a gigabyte of lists."""
_JSON_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_HELD = "waver.held_bytes"


class Held:
    """Bytes of bodies in memory, of all requests of a replica at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.n_bytes = max_bytes, 0

    def take(self, scope: MutableMapping[str, Any], n_bytes: int) -> None:
        """So many more for this request; raises `ApiError` 503 where they are too many."""
        if self.n_bytes + n_bytes > self._max_bytes:
            message = "The server holds as many bodies as it can at once: send it again in a moment."
            raise ApiError(503, "busy", message, headers={"Retry-After": "2", "Connection": "close"})
        self.n_bytes += n_bytes
        scope[_HELD] = scope.get(_HELD, 0) + n_bytes

    def release(self, scope: MutableMapping[str, Any]) -> None:
        """All that this request had; asked twice, nothing."""
        self.n_bytes -= scope.pop(_HELD, 0)


@dataclass
class Fields:
    """A body taken apart: values by name, and the bytes of the parts that were files."""

    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    multipart: bool = False
    """Values are then all text."""


async def read_fields(request: Request, max_bytes: int) -> Fields:
    """The fields of a JSON object or of multipart/form-data. Raises `ApiError` 408, 413, 415, 422, 503."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_encoding", "Compressed bodies are not taken: send it without Content-Encoding.")
    if kind == b"application/json" or kind.endswith(b"+json"):
        data = await read_body(request, max_bytes)
        return Fields(await anyio.to_thread.run_sync(parse_json, data))
    if kind == b"multipart/form-data":
        if not options.get(b"boundary"):
            raise ApiError(422, "invalid_multipart", "The Content-Type of the multipart body names no boundary.")
        data = await read_body(request, max_bytes)
        return await anyio.to_thread.run_sync(partial(parse_multipart, data, options[b"boundary"]))
    message = "Send application/json, or multipart/form-data where a picture goes along."
    raise ApiError(415, "unsupported_media_type", message)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; an `ApiError` 413 as soon as it is known to be too large, 408 when it stops coming.

    Its bytes count as held until `Held.release`, which whoever drops them early calls; the end of the request does so, too.
    """
    held: Held = request.app.state.held
    until = time.monotonic() + WHOLE_S
    too_large = ApiError(
        413,
        "body_too_large",
        f"The body may have {max_bytes / 1e6:g} MB: send a smaller picture.",
        headers={"Connection": "close"},
    )
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > max_bytes):
        raise too_large
    data = bytearray()
    stream = request.stream().__aiter__()
    while True:
        try:
            with anyio.fail_after(max(0.0, min(IDLE_S, until - time.monotonic()))):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return bytes(data)
        except TimeoutError:
            message = f"The body stopped coming for {IDLE_S:.0f} s, or took more than {WHOLE_S:.0f} s: send it again."
            raise ApiError(408, "request_timeout", message, headers={"Connection": "close"}) from None
        if len(data) + len(chunk) > max_bytes:
            raise too_large
        held.take(request.scope, len(chunk))
        data += chunk


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. NaN, Infinity, a name that stands there twice, and bottomless nesting are 422."""
    _require_small(data)
    try:
        value = json.loads(
            data.decode(), parse_constant=_no_constant, parse_float=_finite, parse_int=_short, object_pairs_hook=_without_twins
        )
    except UnicodeDecodeError:
        raise ApiError(422, "invalid_json", "The body is not UTF-8: encode the JSON so.") from None
    except RecursionError:
        raise ApiError(422, "invalid_json", "The JSON is nested too deeply: send one flat object.") from None
    except ValueError as error:
        raise ApiError(422, "invalid_json", f"The body is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(422, "invalid_json", 'The body must be one JSON object, for example {"prompt": "A red disc"}.')
    return value


def _require_small(data: bytes) -> None:
    """Raise 422 where there is more than a request can need beside its texts, before any of it is made into objects."""
    at = between = 0
    while (quote := data.find(b'"', at)) >= 0:
        between += quote - at + 2
        text = _JSON_TEXT.match(data, quote)
        if text is None or between > MAX_BETWEEN_BYTES:
            break
        at = text.end()
    if between + (len(data) - at if quote < 0 else 0) > MAX_BETWEEN_BYTES:
        raise ApiError(422, "invalid_json", "The JSON holds more than one flat object of some fields: send no lists or nests.")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON knows; leave the field out instead.")


def _short(text: str) -> int:
    if len(text) > 30:
        raise ValueError("a number has too many digits; leave the field out instead.")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large; leave the field out instead.")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"'{twin[:64]}' stands there twice; send it once.")
    return found


class _Parts:
    """Gathers what the multipart parser calls back with."""

    def __init__(self) -> None:
        self.fields = Fields(multipart=True)
        self.ended = False
        self._count = 0
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._data = bytearray()
        self._name, self._is_file = "", False

    def on_part_begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise ApiError(422, "too_many_parts", f"The body has more than {MAX_PARTS} parts: send each field once.")
        self._disposition, self._data = b"", bytearray()

    def on_header_begin(self) -> None:
        self._header = (bytearray(), bytearray())

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"")
        if not name or len(name) > MAX_NAME_BYTES:
            raise ApiError(422, "invalid_multipart", "A part has no name, or one too long: name each part like a field.")
        self._name, self._is_file = _text(name, "a part's name"), b"filename" in options
        if self._name in self.fields.values or self._name in self.fields.files:
            raise ApiError(422, "duplicate_field", f"'{self._name}' stands there twice: send it once.", param=self._name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def on_part_end(self) -> None:
        if self._is_file:
            self.fields.files[self._name] = bytes(self._data)
        else:
            self.fields.values[self._name] = _text(bytes(self._data), f"'{self._name}'")

    def on_end(self) -> None:
        self.ended = True


def parse_multipart(data: bytes, boundary: bytes) -> Fields:
    """The parts of a form; text must be UTF-8. An `ApiError` 422 for what is broken, doubled, or too much."""
    parts = _Parts()
    callbacks: Any = {name: getattr(parts, name) for name in dir(parts) if name.startswith("on_")}
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(data)
        parser.finalize()
    except FormParserError:
        raise ApiError(422, "invalid_multipart", "The multipart body is broken: let an HTTP library make it.") from None
    if not parts.ended:
        raise ApiError(422, "invalid_multipart", "The multipart body breaks off: its last boundary is missing.")
    return parts.fields


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ApiError(422, "invalid_multipart", f"{what} is not UTF-8: encode it so.") from None


def require_storable(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise 422 where text holds NUL or half a surrogate pair: no database and no file name can carry those."""
    for name, value in values.items():
        for text in (name, value) if isinstance(value, str) else (name,):
            if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
                param = name if name in known else None
                raise ApiError(
                    422,
                    "invalid_characters",
                    f"{param or 'A field'} holds characters that are no text: take them out.",
                    param=param,
                )
