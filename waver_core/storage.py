"""Paths on any fsspec file system (local, s3://, gs://): listing, reading, atomic writes, content digests."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from typing import IO, Any

from fsspec.core import url_to_fs

from waver_core.errors import UserError

_DIGEST_CHUNK_BYTES = 4 << 20


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of `uri` and the path inside it; a missing driver becomes a `UserError` that names the extra."""
    try:
        fs, path = url_to_fs(str(uri))
    except (ImportError, ValueError) as error:
        scheme = str(uri).split("://", 1)[0]
        mend = f"install the extra: pip install '.[{scheme}]'" if scheme in ("s3", "gs") else "use a local path, s3:// or gs://"
        raise UserError(f"cannot open {uri}: {error}; {mend}") from error
    return fs, path


def is_local(uri: str) -> bool:
    """True where `uri` is a path of this machine that a C library can open by name."""
    return "://" not in str(uri) or str(uri).startswith(("file://", "local://"))


def local_path(uri: str) -> str:
    """`uri` without its file:// prefix."""
    return str(uri).split("://", 1)[1] if "://" in str(uri) else str(uri)


def join(base: str, *parts: str) -> str:
    """Join path parts below a URI or a local path."""
    return "/".join([str(base).rstrip("/"), *parts])


def open_file(uri: str, mode: str = "rb") -> IO[Any]:
    """Open `uri` on whatever file system holds it."""
    fs, path = filesystem(uri)
    handle: IO[Any] = fs.open(path, mode)
    return handle


def exists(uri: str) -> bool:
    """True where a file or a folder of that name is there."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def make_folder(uri: str) -> None:
    """Create a folder and its parents where the file system has folders."""
    fs, path = filesystem(uri)
    fs.makedirs(path, exist_ok=True)


def list_files(folder: str, suffix: str = "") -> list[str]:
    """URIs of the files directly or deeply below `folder`, sorted; hidden and half-written ones left out."""
    fs, path = filesystem(folder)
    if not fs.exists(path):
        return []
    names = [str(name) for name in fs.find(path) if name.endswith(suffix)]
    base = path.rstrip("/")
    visible = [n for n in names if not any(part.startswith(".") for part in n[len(base) :].split("/") if part)]
    return sorted(visible if is_local(folder) else [fs.unstrip_protocol(n) for n in visible])


def write_atomic(uri: str, data: bytes | str) -> None:
    """Write a whole file or nothing: a reader never sees a part, also when the writer is killed.

    Local files go through a temporary name in the same folder, `fsync` and a rename. Object stores publish an object
    only once its upload is complete, so there a plain write is atomic already.
    """
    payload = data.encode() if isinstance(data, str) else data
    if not is_local(uri):
        fs, path = filesystem(uri)
        fs.pipe_file(path, payload)
        return
    path = local_path(uri)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as handle:
            handle.write(payload)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def read_bytes(uri: str) -> bytes:
    """The whole content of a file."""
    with open_file(uri) as handle:
        data: bytes = handle.read()
    return data


def remove(uri: str, recursive: bool = False) -> None:
    """Delete a file (or a folder with `recursive`); nothing happens where it is gone already."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=recursive)


def size_and_mtime(uri: str) -> tuple[int, str]:
    """Size in bytes and a string that changes when the file does (modification time or ETag)."""
    fs, path = filesystem(uri)
    info = fs.info(path)
    stamp = info.get("mtime") or info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("updated") or ""
    return int(info.get("size") or 0), str(stamp)


def content_digest(uri: str) -> str:
    """BLAKE2b-128 of a file's bytes as hex: the identity of a source, whatever it is called."""
    digest = hashlib.blake2b(digest_size=16)
    for chunk in _chunks(uri):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(uri: str) -> Iterator[bytes]:
    with open_file(uri) as handle:
        while chunk := handle.read(_DIGEST_CHUNK_BYTES):
            yield chunk
