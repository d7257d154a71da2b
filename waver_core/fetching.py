"""Brings checkpoints into the models folder: repositories of the Hugging Face hub, or single files at a URL.

    <models folder>/<repo>/                      the files, as the backends load them
    <models folder>/<repo>/openwaver-fetched.json    written last: the commit they came from, and their digests
    <models folder>/<repo>/*.incomplete          a fetch that is under way or was cut off; run it again to go on

Never called by a job: see `waver_core.checkpoints`. Only `python curation/models.py fetch` does.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import json
import os
import pkgutil
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from waver_core import __version__
from waver_core.checkpoints import FETCHED_NAME, Checkpoint, known_or
from waver_core.errors import BackendUnavailable, ConfigError, UserError
from waver_core.storage import write_atomic

Say = Callable[[str], None]
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_UNDER_WAY = "openwaver-fetching.incomplete"
"""Lies in a repository's folder during a fetch: some of its files may not even have been begun."""


class FetchFailed(UserError):
    """One checkpoint could not be brought. The message names it and the reason."""


def record_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the last fetch wrote down; empty for files that were copied here by hand without it."""
    try:
        return dict(json.loads((checkpoint.folder / FETCHED_NAME).read_text()))
    except (OSError, ValueError):
        return {}


def state_of(checkpoint: Checkpoint) -> str:
    """`present`, `missing`, `incomplete` (a fetch was cut off), or `other revision`."""
    if not checkpoint.present:
        folder = checkpoint.folder
        return "incomplete" if folder.is_dir() and any(folder.rglob("*.incomplete")) else "missing"
    record = record_of(checkpoint)
    if checkpoint.url is None and record and checkpoint.revision not in (record.get("asked"), record.get("revision")):
        return "other revision"
    return "present"


def known_checkpoint(repo: str, revision: str | None = None) -> Checkpoint:
    """What the pretrained backends know of a checkpoint (size, licence, URL), or else just its name."""
    return known_or(repo, tuple(_declared()), revision)


def _declared() -> Iterator[Checkpoint]:
    """Every checkpoint that a backend declares, in its module or on its class."""
    package = importlib.import_module("waver_core.backends.pretrained")
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        for value in list(vars(module).values()):
            group = getattr(value, "known", ()) if isinstance(value, type) else value
            members = group.values() if isinstance(group, Mapping) else group if isinstance(group, tuple) else ()
            yield from (c for c in members if isinstance(c, Checkpoint))


def distinct(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Each repository once, with the files that any of its users wants; two revisions of one are an error."""
    found: dict[str, Checkpoint] = {}
    for checkpoint in checkpoints:
        first = found.setdefault(checkpoint.repo, checkpoint)
        if first.revision != checkpoint.revision:
            raise ConfigError(
                f"{checkpoint.repo} is wanted at two revisions, {first.revision} and {checkpoint.revision}; its folder holds one"
            )
        found[checkpoint.repo] = replace(first, files=tuple(dict.fromkeys([*first.files, *checkpoint.files])))
    return list(found.values())


def fetch(checkpoint: Checkpoint, say: Say = print) -> bool:
    """Bring what is missing of one checkpoint and return whether anything was. Raises `FetchFailed` with one line."""
    if state_of(checkpoint) == "present":
        return False
    if Path(checkpoint.repo).expanduser().is_absolute():
        raise FetchFailed(f"{checkpoint.repo} is a folder of your own and holds no weights: copy them there")
    (_fetch_repo if checkpoint.url is None else _fetch_url)(checkpoint, say)
    return True


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise `FetchFailed` where the disk of `folder` has less room than that."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise FetchFailed(
            f"{n_bytes / 1e9:.1f} GB are to be fetched into {folder}, where {free / 1e9:.1f} GB are free: make room, or set "
            "OPENWAVER_MODELS to a folder on a larger disk"
        )


def _fetch_repo(checkpoint: Checkpoint, say: Say) -> None:
    """Download the wanted files of a repository at one commit, check them, and write down which commit it was."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise BackendUnavailable(
            f"fetching {checkpoint.repo} needs huggingface_hub: run `make setup-models`, or pip install -e '.[models]'"
        ) from error
    folder = checkpoint.folder
    if checkpoint.gated and not hub.get_token():
        raise _needs_token(checkpoint)
    try:
        info = hub.HfApi().repo_info(checkpoint.repo, revision=checkpoint.revision, files_metadata=True)
        if info.gated and not hub.get_token():
            raise _needs_token(checkpoint)
        names = hub.utils.filter_repo_objects([s.rfilename for s in info.siblings], allow_patterns=list(checkpoint.files))
        wanted = {s.rfilename: s for s in info.siblings if s.rfilename in set(names)}
        if not wanted:
            raise FetchFailed(f"{checkpoint.repo}@{checkpoint.revision} has none of the files {', '.join(checkpoint.files)}")
        n_bytes = sum(s.size or 0 for s in wanted.values())
        require_space(folder, sum(s.size or 0 for name, s in wanted.items() if _size(folder / name) != s.size))
        say(f"{checkpoint.repo}: {len(wanted)} files, {n_bytes / 1e6:,.0f} MB, commit {info.sha[:12]}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _UNDER_WAY).touch()
        hub.snapshot_download(checkpoint.repo, revision=info.sha, allow_patterns=list(checkpoint.files), local_dir=folder)
    except UserError:
        raise
    except Exception as error:  # whatever HTTP client the hub's library stands on has errors of its own
        raise _explained(checkpoint, error, hub.errors) from error
    digests = {name: _digest(folder / name) for name in sorted(wanted)}
    for name, sibling in wanted.items():
        expected = getattr(sibling.lfs, "sha256", None)
        if expected and digests[name] != expected:
            (folder / name).unlink()
            raise FetchFailed(f"{checkpoint.repo}: {name} came damaged and was removed: run the same command again")
    for name in record_of(checkpoint).get("files", {}).keys() - wanted.keys():  # left over from another revision
        (folder / name).unlink(missing_ok=True)
    _write_record(checkpoint, info.sha, digests)
    (folder / _UNDER_WAY).unlink()


def _fetch_url(checkpoint: Checkpoint, say: Say) -> None:
    """Stream a file to a name that nobody loads, check its digest, then give it its own."""
    assert checkpoint.url is not None
    target = checkpoint.folder / checkpoint.url.rsplit("/", 1)[-1]
    part = target.with_name(target.name + ".incomplete")
    # Files of torchvision carry the beginning of their digest in their name.
    in_name = re.search(r"-([0-9a-f]{8,})\.[a-z]+$", target.name)
    expected = checkpoint.sha256 or (in_name[1] if in_name else "")
    have = part.stat().st_size if part.exists() and expected else 0  # without a digest nothing would tell a wrong seam
    headers = {"User-Agent": f"openwaver/{__version__}", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with urlopen(Request(checkpoint.url, headers=headers), timeout=_TIMEOUT_S) as answer:
            length = int(answer.headers.get("Content-Length") or 0)
            require_space(target.parent, length)
            say(f"{checkpoint.repo}: {target.name}, {length / 1e6:,.1f} MB" + (" left" if answer.status == 206 else ""))
            start = have if answer.status == 206 else 0
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("ab" if start else "wb") as file:
                shutil.copyfileobj(answer, file, _CHUNK_BYTES)
        if length and part.stat().st_size != start + length:
            raise FetchFailed(f"{checkpoint.repo}: the connection to {checkpoint.url} broke off: run the same command again")
    except HTTPError as error:
        if error.code == 416 and have:  # all of it was there already, or more than there is now
            part.unlink()
            return _fetch_url(checkpoint, say)
        raise FetchFailed(f"{checkpoint.repo}: {checkpoint.url} answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise FetchFailed(f"{checkpoint.repo}: {checkpoint.url} cannot be fetched: {_first_line(error)}") from error
    digest = _digest(part)
    if expected and not digest.startswith(expected):
        part.unlink()
        with suppress(OSError):  # other files may lie there
            target.parent.rmdir()
        raise FetchFailed(f"{checkpoint.repo}: {checkpoint.url} has the sha256 {digest}, not {expected}: nothing was kept")
    part.replace(target)
    _write_record(checkpoint, f"sha256-{digest[:16]}", {target.name: digest})


def _write_record(checkpoint: Checkpoint, revision: str, digests: Mapping[str, str]) -> None:
    folder = checkpoint.folder
    record = {
        "repo": checkpoint.repo,
        "url": checkpoint.url,
        "asked": checkpoint.revision,
        "revision": revision,
        "licence": checkpoint.licence,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: {"sha256": digest, "bytes": _size(folder / name)} for name, digest in digests.items()},
    }
    write_atomic(str(folder / FETCHED_NAME), json.dumps(record, indent=2) + "\n")


def _needs_token(checkpoint: Checkpoint) -> FetchFailed:
    return FetchFailed(
        f"{checkpoint.repo} is gated: ask for access at {_page(checkpoint)}, then set HF_TOKEN to a token of your account"
    )


def _explained(checkpoint: Checkpoint, error: Exception, errors: Any) -> FetchFailed:
    """What the hub's library raised, in one line."""
    repo, page = checkpoint.repo, _page(checkpoint)
    if isinstance(error, errors.GatedRepoError):
        return FetchFailed(f"{repo} is gated and the account of your HF_TOKEN has no access: ask for it at {page}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FetchFailed(f"{repo} has no revision '{checkpoint.revision}': see {page}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FetchFailed(f"the hub shows no repository {repo} ({page}); for a private one set HF_TOKEN")
    return FetchFailed(f"{repo} cannot be fetched: {_first_line(error)}")


def _page(checkpoint: Checkpoint) -> str:
    return f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{checkpoint.repo}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
