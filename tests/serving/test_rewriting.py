"""Rewriting helps where it can and stands in the way nowhere: late, empty, long, broken and hanging backends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import rewriting
from serving.rewriting import MAX_STUCK, Rewriter, Rewritten, make_rewriter, reason_of
from serving.settings import Rewriting as Settings
from waver_core.backends.contracts import Rewriting
from waver_core.errors import BackendUnavailable, ConfigError

STYLE = "2D anime style"
CAT = Rewriting("a cat", 5)
PATIENT = Settings(timeout_s=20.0)
HASTY = Settings(timeout_s=0.05)


class Backend:
    """Answers what `answer` makes of a prompt; what it raises is raised."""

    fingerprint = "test-1"

    def __init__(self, answer: Callable[[str], object]) -> None:
        self.answer, self.calls = answer, 0

    def rewrite(self, requests: Sequence[Rewriting]) -> list[str | Exception]:
        self.calls += 1
        return [self.answer(request.prompt) for request in requests]  # type: ignore[misc]


def fails(error: BaseException) -> Callable[[str], object]:
    def answer(prompt: str) -> object:
        raise error

    return answer


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a hanging backend waits for; opened at the end, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_rewritten_prompt_says_by_whom_and_from_what() -> None:
    found = Rewriter(Backend(lambda prompt: f" {prompt}\n on\x00 a  sofa "), PATIENT).rewrite(CAT)
    assert found == Rewritten("a cat on a sofa", "a cat", "test-1", "")


def test_style_words_stand_first_whether_rewriting_is_on_or_off_and_once() -> None:
    styled = CAT._replace(style_words=STYLE)
    assert Rewriter(None, PATIENT).rewrite(styled) == Rewritten(f"{STYLE}. a cat", "a cat")
    assert Rewriter(None, PATIENT).rewrite(CAT) == Rewritten("a cat", "a cat")
    again = Rewriter(None, PATIENT).rewrite(Rewriting(f"{STYLE.lower()}, a cat", 5, f"{STYLE}."))
    assert again.prompt == f"{STYLE.lower()}, a cat"
    for before in ("", f"{STYLE}. "):
        backend = Backend(f"{before}{{}} runs".format)
        assert Rewriter(backend, PATIENT).rewrite(styled).prompt == f"{STYLE}. a cat runs"
    broken = Rewriter(Backend(fails(RuntimeError("no"))), PATIENT).rewrite(styled)
    assert broken.prompt == f"{STYLE}. a cat" and broken.fell_back


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda prompt: "", "the rewriter's answer was empty"),
        (lambda prompt: " \n\x00 ", "the rewriter's answer was empty"),
        (lambda prompt: "x" * 2001, "the rewriter's answer has 2001 characters, and at most 2000 are taken"),
        (lambda prompt: None, "the rewriter answered with NoneType, not with text"),
        (lambda prompt: ValueError("the answer holds no JSON object"), "could not be used: the answer holds no JSON object"),
        (fails(RuntimeError("http://10.0.0.5/v1: HTTP 500: key sk-1")), "the rewriter failed (RuntimeError); the server's log"),
        (fails(SystemExit(3)), "the rewriter failed (RuntimeError)"),
        (fails(BackendUnavailable("needs the package torch:\n pip install x")), "needs the package torch: pip install x"),
        (fails(BackendUnavailable("set KEY for http://10.0.0.5:8000/v1 or see /srv/models/x")), "for (address) or see (path)"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_leaves_the_original_and_says_why_in_one_line(answer: Callable[[str], object], reason: str) -> None:
    found = Rewriter(Backend(answer), PATIENT).rewrite(CAT)
    assert (found.prompt, found.original, found.by) == ("a cat", "a cat", "")
    assert reason in found.fell_back
    assert "\n" not in found.fell_back and len(found.fell_back) <= 240
    assert "sk-1" not in found.fell_back and "10.0.0.5" not in found.fell_back


def test_a_backend_with_too_few_or_too_many_answers_is_not_believed() -> None:
    class Miscounting(Backend):
        def rewrite(self, requests: Sequence[Rewriting]) -> list[str | Exception]:
            return ["A cat runs."] * self.answer("")  # type: ignore[operator, return-value]

    for count in (0, 2):
        found = Rewriter(Miscounting(lambda prompt, n=count: n), PATIENT).rewrite(CAT)  # type: ignore[misc]
        assert found.prompt == "a cat" and found.fell_back


def test_a_late_answer_is_not_waited_for_and_the_next_call_is_none_the_worse(gate: threading.Event) -> None:
    backend = Backend(lambda prompt: gate.wait(10) and "late" if prompt == "hang" else "A cat runs.")
    rewriter = Rewriter(backend, HASTY)
    started = time.monotonic()
    found = rewriter.rewrite(Rewriting("hang", 5))
    assert time.monotonic() - started < 5
    assert found == Rewritten("hang", "hang", "", "the rewriter did not answer within 0.05 s")
    patient = Rewriter(backend, PATIENT)
    assert patient.rewrite(CAT).prompt == "A cat runs."


def test_a_backend_that_hangs_gathers_no_threads_and_is_asked_again_once_it_answers(gate: threading.Event) -> None:
    backend = Backend(lambda prompt: "A cat runs." if gate.wait(20) else "")
    rewriter = Rewriter(backend, HASTY)
    before = threading.active_count()
    for _ in range(MAX_STUCK):
        assert "did not answer" in rewriter.rewrite(CAT).fell_back
    started = time.monotonic()
    for _ in range(50):
        assert f"{MAX_STUCK} earlier prompts are still being rewritten" in rewriter.rewrite(CAT).fell_back
    assert time.monotonic() - started < 0.05 * 50  # at once, not after the time-out each
    assert backend.calls == MAX_STUCK
    assert threading.active_count() <= before + MAX_STUCK
    gate.set()
    until(lambda: threading.active_count() <= before)
    assert Rewriter(backend, PATIENT).rewrite(CAT).by == "test-1"
    until(lambda: rewriter.rewrite(CAT).by == "test-1")


def test_calls_of_several_threads_get_their_own_answers() -> None:
    barrier = threading.Barrier(8, timeout=20)

    def answer(prompt: str) -> str:
        barrier.wait()  # all eight are under way at once
        return prompt.upper()

    rewriter = Rewriter(Backend(answer), PATIENT)
    found: dict[int, Rewritten] = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: rewriter.rewrite(Rewriting(f"cat {k}", 5))})) for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {k: r.prompt for k, r in found.items()} == {k: f"CAT {k}" for k in range(8)}


@given(
    st.text(alphabet=st.characters(), max_size=60), st.text(alphabet=st.characters(), max_size=300), st.sampled_from(["", STYLE])
)
def test_any_prompt_and_any_answer_give_a_prompt_within_the_cap_or_the_original(prompt: str, answer: str, style: str) -> None:
    settings = Settings(timeout_s=20.0, max_chars=120)
    request = Rewriting(prompt, 5, style)
    found = Rewriter(Backend(lambda _: answer), settings).rewrite(request)
    assert isinstance(found.prompt, str) and found.original == prompt
    assert bool(found.by) != bool(found.fell_back)
    assert found.prompt.lower().startswith(style.lower())
    if found.by:
        assert 0 < len(found.prompt) <= settings.max_chars
        assert found.prompt == " ".join(found.prompt.split())
    else:
        assert found.prompt == request.tagged(prompt)


def test_the_configured_rewriter_is_made_with_the_cap() -> None:
    assert make_rewriter(Settings(backend=None)).rewrite(CAT) == Rewritten("a cat", "a cat")
    default = make_rewriter(Settings())
    found = default.rewrite(Rewriting("red disc moving left", 2))
    assert found.prompt == "A medium-sized red disc moves to the left over a white background."
    assert found.by.startswith("template-1") and not found.fell_back
    short = make_rewriter(Settings(max_chars=60)).rewrite(CAT)
    assert len(short.prompt) <= 60 and short.by.endswith("max_chars=60") and not short.fell_back
    with pytest.raises(ConfigError, match="did you mean 'template'"):
        make_rewriter(Settings(backend="templates"))
    with pytest.raises(ConfigError, match="backend prompt_rewriter/template"):
        make_rewriter(Settings(options={"colour": "red"}))


def test_the_log_says_what_clients_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(rewriting._log, "warning", lambda text, *args: said.append(text % args))
    Rewriter(Backend(fails(RuntimeError("HTTP 500 from 10.0.0.5"))), PATIENT).rewrite(CAT)
    assert said == ["a prompt is used as it was written: RuntimeError: HTTP 500 from 10.0.0.5"]
    assert reason_of(BackendUnavailable("")) == "BackendUnavailable"
