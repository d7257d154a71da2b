"""Storage: whole files or none on every file system, listings without half-written files, identity by content."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from waver_core import storage
from waver_core.errors import UserError
from waver_core.storage import (
    content_digest,
    exists,
    is_local,
    join,
    list_files,
    local_path,
    make_folder,
    open_file,
    read_bytes,
    remove,
    size_and_mtime,
    write_atomic,
)


@pytest.fixture(params=["local", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder on the local and on the in-memory file system."""
    if request.param == "local":
        yield str(tmp_path / "base")
        return
    folder = f"memory://test-{uuid.uuid4().hex[:8]}"
    yield folder
    remove(folder, recursive=True)


def test_written_files_read_back_and_overwrite(base: str) -> None:
    uri = join(base, "deep", "er", "a.bin")
    write_atomic(uri, b"one")
    write_atomic(uri, "zwei ü")
    assert read_bytes(uri) == "zwei ü".encode()
    assert exists(uri) and exists(join(base, "deep"))
    with open_file(uri) as handle:
        assert handle.read(4) == b"zwei"


def test_remove_is_silent_about_what_is_gone(base: str) -> None:
    write_atomic(join(base, "x", "a"), b"1")
    remove(join(base, "x"), recursive=True)
    assert not exists(join(base, "x", "a"))
    remove(join(base, "x"), recursive=True)


def test_list_files_is_deep_and_sorted_and_leaves_out_hidden_ones(base: str) -> None:
    for name in (
        "b.parquet",
        "a.parquet",
        "sub/c.parquet",
        "note.txt",
        ".a.parquet.1a2b3c4d",
        ".cache/d.parquet",
        "sub/.e.parquet",
    ):
        write_atomic(join(base, name), b"x")
    listed = [uri.split(base.rsplit("/", 1)[1] + "/", 1)[1] for uri in list_files(base, ".parquet")]
    assert listed == ["a.parquet", "b.parquet", "sub/c.parquet"]
    assert [uri.rsplit("/", 1)[1] for uri in list_files(base)] == ["a.parquet", "b.parquet", "note.txt", "c.parquet"]
    assert [read_bytes(uri) for uri in list_files(base)] == [b"x"] * 4


def test_list_files_of_a_missing_folder_is_empty(base: str) -> None:
    assert list_files(join(base, "none")) == []


def test_list_files_below_a_hidden_folder_sees_its_files(tmp_path: Path) -> None:
    write_atomic(str(tmp_path / ".hidden" / "a.txt"), b"x")
    assert len(list_files(str(tmp_path / ".hidden"))) == 1


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, before: bytes | None
) -> None:
    target = tmp_path / "result.parquet"
    if before is not None:
        target.write_bytes(before)

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(str(target), b"new and much longer")
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["result.parquet"])
    if before is not None:
        assert target.read_bytes() == before


def test_a_writer_that_was_killed_leaves_only_a_name_that_no_reader_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def fail(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:  # as SIGKILL: not even the clean-up runs
        patch.setattr(os, "replace", fail)
        patch.setattr(os, "unlink", fail)
        with pytest.raises(Killed):
            write_atomic(str(tmp_path / "a.parquet"), b"new")
    assert len(list(tmp_path.iterdir())) == 1
    assert list_files(str(tmp_path)) == list_files(str(tmp_path), ".parquet") == []
    assert not exists(str(tmp_path / "a.parquet"))


def test_the_file_appears_under_its_name_only_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), real_sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), real_replace(a, b))[1])
    write_atomic(str(tmp_path / "a"), b"1")
    assert order == ["fsync", "replace"]


def test_content_digest_depends_on_the_bytes_alone(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_DIGEST_CHUNK_BYTES", 7)
    write_atomic(join(base, "a.mp4"), b"0123456789" * 5)
    write_atomic(join(base, "copy", "b.bin"), b"0123456789" * 5)
    write_atomic(join(base, "c.mp4"), b"0123456789" * 4 + b"012345678X")
    digests = [content_digest(join(base, n)) for n in ("a.mp4", "copy/b.bin", "c.mp4")]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 32 and int(digests[0], 16)


def test_content_digest_is_pinned(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"openwaver")
    assert content_digest(str(tmp_path / "a")) == "139e722a83da29dc6c87814824a2ecf0"


def test_size_and_stamp_tell_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    os.utime(path, (1, 1))
    size, stamp = size_and_mtime(str(path))
    os.utime(path, (1, 2))
    assert size == 4 and size_and_mtime(str(path)) != (size, stamp)


@pytest.mark.parametrize(
    ("uri", "local", "path"),
    [("/a/b", True, "/a/b"), ("a/b", True, "a/b"), ("file:///a/b", True, "/a/b"), ("s3://a/b", False, "a/b")],
)
def test_local_and_other_addresses(uri: str, local: bool, path: str) -> None:
    assert is_local(uri) is local
    assert local_path(uri) == path


def test_file_addresses_are_local_paths_to_every_function(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/x/a.txt"
    write_atomic(uri, b"1")
    assert (tmp_path / "x" / "a.txt").read_bytes() == read_bytes(uri) == b"1"
    assert list_files(f"file://{tmp_path}/x") == [str(tmp_path / "x" / "a.txt")]
    make_folder(f"file://{tmp_path}/y/z")
    assert (tmp_path / "y" / "z").is_dir()


def test_join_keeps_the_scheme_and_doubles_no_slash() -> None:
    assert join("s3://bucket/", "a", "b.c") == "s3://bucket/a/b.c"
    assert join("out/", "a") == "out/a"


@pytest.mark.parametrize("use", [exists, list_files, read_bytes, content_digest, size_and_mtime, make_folder])
def test_a_missing_driver_is_a_user_error_that_names_the_extra(use: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("s3fs") is not None:

        def absent(*args: object, **kwargs: object) -> None:
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec.core, "get_filesystem_class", absent)
    with pytest.raises(UserError) as caught:
        use("s3://bucket/key")  # type: ignore[operator]
    text = str(caught.value)
    assert "s3://bucket/key" in text and "pip install '.[s3]'" in text and "\n" not in text
