"""The prompt as it is generated from: rewritten by a backend (Waver §4.6), with the style's words before it (§4.5).

Rewriting is a help, never a condition: where it fails, is late or answers what cannot be used, the prompt stays as the user
wrote it, and the result says so.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import Any, NamedTuple

from serving.settings import Rewriting as RewritingSettings
from waver_core.backends.contracts import PromptRewriter, Rewriting
from waver_core.errors import UserError
from waver_core.registry import create

MAX_STUCK = 4
"""So many calls may be late at once; while they are, no other is made, or a backend that hangs would gather threads."""
_log = logging.getLogger("waver.serving.rewriting")
_MAX_REASON_CHARS = 240
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>)]+", re.IGNORECASE)
_PATH = re.compile(r"(?<![\w.])/(?:[\w.@+-]+/)+[\w.@+-]*")
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")


class Rewritten(NamedTuple):
    """What became of a prompt. `prompt` has the style's words before it, `original` is as the user wrote it. `by` is the
    backend's fingerprint, empty where the original is used: because rewriting is off, or for the reason in `fell_back`."""

    prompt: str
    original: str
    by: str = ""
    fell_back: str = ""


class _Unusable(Exception):
    """An answer that is refused; the message is for the user."""


class Rewriter:
    """Rewrites one prompt at a call; calls may come from several threads. `backend` None leaves prompts as they are.

    fatal: an error after which this process can rewrite nothing any more; it comes through.
    """

    def __init__(
        self, backend: PromptRewriter | None, settings: RewritingSettings, fatal: type[Exception] | tuple[()] = ()
    ) -> None:
        self.backend, self._timeout_s, self._max_chars = backend, settings.timeout_s, settings.max_chars
        self._fatal = fatal
        self._stuck = 0
        self._lock = threading.Lock()

    def rewrite(self, request: Rewriting) -> Rewritten:
        """The prompt to generate from; raises nothing but `fatal` for what a backend does, and returns within `timeout_s`."""
        if self.backend is None:
            return Rewritten(request.tagged(request.prompt), request.prompt)
        try:
            return Rewritten(
                self._checked(self._answer(self.backend, request), request), request.prompt, self.backend.fingerprint
            )
        except self._fatal:
            raise
        except Exception as error:
            _log.warning("a prompt is used as it was written: %s: %s", type(error).__name__, error)
            return Rewritten(request.tagged(request.prompt), request.prompt, fell_back=reason_of(error))

    def _answer(self, backend: PromptRewriter, request: Rewriting) -> object:
        """What the backend answers, from a thread of its own: nothing else can be waited for with a limit."""
        with self._lock:
            if self._stuck >= MAX_STUCK:
                raise _Unusable(f"{self._stuck} earlier prompts are still being rewritten; restart the rewriter if that lasts")
        call = _Call(backend, request)
        threading.Thread(target=self._run, args=(call,), name="rewriting", daemon=True).start()
        call.done.wait(self._timeout_s)
        with self._lock:
            if not call.done.is_set():
                call.late = True
                self._stuck += 1
                raise _Unusable(f"the rewriter did not answer within {self._timeout_s:g} s")
        if isinstance(call.answer, BaseException):
            raise call.answer if isinstance(call.answer, Exception) else RuntimeError(repr(call.answer))
        return call.answer

    def _run(self, call: _Call) -> None:
        try:
            (call.answer,) = call.backend.rewrite([call.request])
        except BaseException as error:
            call.answer = error.with_traceback(None)
        with self._lock:
            call.done.set()
            if call.late:
                self._stuck -= 1

    def _checked(self, answer: object, request: Rewriting) -> str:
        if not isinstance(answer, str):
            raise _Unusable(f"the rewriter answered with {type(answer).__name__}, not with text")
        text = " ".join(answer.translate(_CONTROLS).split())
        if not text:
            raise _Unusable("the rewriter's answer was empty")
        text = request.tagged(text)
        if len(text) > self._max_chars:
            raise _Unusable(f"the rewriter's answer has {len(text)} characters, and at most {self._max_chars} are taken")
        return text


class _Call:
    """One call of a backend. `late`: nobody waits for it any more."""

    def __init__(self, backend: PromptRewriter, request: Rewriting) -> None:
        self.backend, self.request = backend, request
        self.answer: Any = None
        self.done = threading.Event()
        self.late = False


def make_rewriter(settings: RewritingSettings, fatal: type[Exception] | tuple[()] = ()) -> Rewriter:
    """The rewriter of a configuration; raises `ConfigError` for a backend or an option that is not known."""
    if settings.backend is None:
        return Rewriter(None, settings)
    options = {"max_chars": settings.max_chars, **settings.options}
    return Rewriter(create("prompt_rewriter", settings.backend, **options), settings, fatal)


def reason_of(error: Exception) -> str:
    """Why the original is used, in one line that clients may read: no addresses or paths of the server, no stranger's text."""
    if not isinstance(error, _Unusable | UserError | ValueError):
        return f"the rewriter failed ({type(error).__name__}); the server's log says more"
    line = _PATH.sub("(path)", _ADDRESS.sub("(address)", " ".join(str(error).split())))
    if isinstance(error, ValueError):
        line = f"the rewriter's answer could not be used: {line}"
    return (line or type(error).__name__)[:_MAX_REASON_CHARS]
