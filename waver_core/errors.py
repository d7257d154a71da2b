"""Error types that a user can act on. Entry scripts print their one line and exit with `exit_code`, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend; the message names the fix."""

    exit_code = 2


class ConfigError(UserError):
    """A key, value or reference in the configuration is wrong."""


class BackendUnavailable(UserError):
    """A weight or a package is missing; the message holds the command that brings it."""


class RunFailed(UserError):
    """The run ended, but its result must not be taken for a success (nothing survived, budget of failures spent)."""

    exit_code = 3


class MediaError(Exception):
    """A file that cannot be used. `reason` is a word of the ledger's vocabulary, the message is for a person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        return MediaError, (self.reason, str(self))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known words, for the end of an error message."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{w}'" for w in near) + "?"
    return "known: " + ", ".join(known) if known else "nothing of that kind is known"
