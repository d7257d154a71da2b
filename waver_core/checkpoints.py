"""Where the weights of pretrained backends lie, and what a person needs to know before fetching them.

A checkpoint is a folder `<models folder>/<repo>` (or one file in it). Nothing is downloaded while a job runs: a backend
that does not find its folder raises `BackendUnavailable` with the command that brings it. On a machine without network,
copy the folder, or give a backend the path of its own with the option `checkpoint`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from waver_core.config import digest_of
from waver_core.errors import BackendUnavailable

FETCHED_NAME = "openwaver-fetched.json"
"""Written beside fetched files: the commit they came from and their digests."""


@dataclass(frozen=True)
class Checkpoint:
    """What a backend loads: files of a repository on the Hugging Face hub, or a single file at a URL."""

    repo: str
    """`owner/name` on the hub, or the name under which a URL's file is kept."""
    size_mb: int | None = None
    """Size of the files, in 10^6 bytes; None where it is not known."""
    licence: str = "unknown"
    files: tuple[str, ...] = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
    url: str | None = None
    sha256: str | None = None
    revision: str = "main"
    gated: bool = False
    """Whether the hub asks for a login and consent first."""

    @property
    def folder(self) -> Path:
        """Where the files lie, present or not; `repo` may also be the path of a folder."""
        given = Path(self.repo).expanduser()
        return given if given.is_absolute() or given.is_dir() else models_folder() / self.repo

    @property
    def present(self) -> bool:
        """Whether at least one file of weights is there and whole (a fetch under way leaves `.incomplete` files)."""
        folder = self.folder
        if not folder.is_dir():
            return False
        if self.url is not None:
            return (folder / self.url.rsplit("/", 1)[-1]).is_file()
        files = [f for f in folder.rglob("*") if f.is_file()]
        return any(f.suffix in _WEIGHTS for f in files) and not any(f.suffix == ".incomplete" for f in files)

    @property
    def exact_revision(self) -> str:
        """The commit that was fetched where that is recorded; of a folder of one's own a digest of its files' names, sizes
        and times, so that weights put in the place of others count as new; else the revision asked for."""
        try:
            return str(json.loads((self.folder / FETCHED_NAME).read_text())["revision"])
        except (OSError, ValueError, KeyError):
            return f"{self.revision}-local-{_digest_of(self.folder)}" if self.is_own and self.folder.is_dir() else self.revision

    @property
    def is_own(self) -> bool:
        """Whether `repo` is the path of a folder, and nothing of the hub's."""
        return Path(self.repo).expanduser() == self.folder

    def locate(self) -> Path:
        """The folder (or, for a URL, the file) to load. Raises `BackendUnavailable` with what to do where it is missing."""
        if not self.present and self.is_own:
            raise BackendUnavailable(
                f"the folder {self.folder}, given as checkpoint, is not there or holds no weights: copy it there"
            )
        if not self.present:
            size = f"{self.size_mb:,} MB" if self.size_mb else "size unknown"
            asked = self.repo if self.revision == "main" else f"{self.repo} --revision {self.revision}"
            raise BackendUnavailable(
                f"the checkpoint {self.repo} ({size}, licence {self.licence}) is not at {self.folder}: run "
                f"`python curation/models.py fetch --checkpoint {asked}`, or set OPENWAVER_MODELS to the folder that has it"
            )
        return self.folder / self.url.rsplit("/", 1)[-1] if self.url else self.folder


_WEIGHTS = {".safetensors", ".pth", ".pt", ".bin", ".pdiparams", ".onnx"}


def _digest_of(folder: Path) -> str:
    stats = [
        (str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()
    ]
    return digest_of(stats)


def models_folder() -> Path:
    """`$OPENWAVER_MODELS`, or `~/.cache/openwaver/models`."""
    return Path(os.environ.get("OPENWAVER_MODELS") or Path.home() / ".cache" / "openwaver" / "models").expanduser()


def known_or(repo: str, known: tuple[Checkpoint, ...], revision: str | None = None) -> Checkpoint:
    """The entry of `known` for `repo`, or an entry about which nothing is known; with another revision if one is given."""
    checkpoint = next((c for c in known if c.repo == repo), Checkpoint(repo))
    return replace(checkpoint, revision=revision) if revision else checkpoint
