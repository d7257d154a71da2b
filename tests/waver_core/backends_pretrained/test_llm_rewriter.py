"""The language model as rewriter: prompts by length, user text that stays data, checked answers, an endpoint, a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waver_core.backends_pretrained.test_chat import Endpoint, content
from tests.waver_core.backends_pretrained.tiny_chat import save_qwen_text
from waver_core.backends.contracts import PromptRewriter, Rewriting
from waver_core.backends.pretrained.llm_rewriter import LlmRewriter
from waver_core.errors import BackendUnavailable, ConfigError
from waver_core.prompts import load_prompt
from waver_core.registry import backends, create

pytestmark = pytest.mark.models
KEY = "OPENWAVER_TEST_REWRITER_KEY"
CAPTION = "A grey cat with white paws walks over a wooden floor."
PROMPTS = ("rewrite_5s.v1", "rewrite_10s.v1", "rewrite_image.v1")
REWRITER = LlmRewriter(engine="openai", base_url="http://127.0.0.1:9/v1", model="m")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    server.reply = lambda body, k: content(json.dumps({"prompt": CAPTION}))
    yield server
    server.close()


def remote(endpoint: Endpoint, **options: Any) -> LlmRewriter:
    return create("prompt_rewriter", "llm", engine="openai", base_url=endpoint.url, model="m", **options)


def request_in(body: dict[str, Any]) -> dict[str, str]:
    """What a model can read from a request: the JSON between the tags."""
    text = body["messages"][1]["content"]
    assert text.startswith("<request>\n") and text.endswith("\n</request>")
    return json.loads(text.removeprefix("<request>\n").removesuffix("\n</request>"))


def examples(name: str) -> list[tuple[dict[str, str], str]]:
    """The (request, caption) pairs of a system prompt."""
    found = re.findall(r"<request>\n(\{.*\})\n</request>\n(\{.*\})\n", load_prompt(name).text)
    return [(json.loads(asked), json.loads(answer)["prompt"]) for asked, answer in found]


@pytest.mark.parametrize("name", PROMPTS)
def test_the_examples_of_a_prompt_keep_its_own_rules(name: str) -> None:
    text, pairs = load_prompt(name).text, examples(name)
    low, high = map(int, re.search(r"one paragraph of (\d+) to (\d+) words", text).groups())  # type: ignore[union-attr]
    assert len(pairs) >= 2
    assert any(asked["style"] for asked, _ in pairs)
    for asked, caption in pairs:
        assert low <= len(caption.split()) <= high
        answer = json.dumps({"prompt": caption})
        assert REWRITER.parse(answer, Rewriting(asked["prompt"], 5, asked["style"])) == caption
        assert caption.startswith(f"{asked['style']}. " if asked["style"] else "")


def test_ten_seconds_get_more_words_and_more_action_than_five() -> None:
    five, ten = ([len(caption.split()) for _, caption in examples(name)] for name in PROMPTS[:2])
    assert min(ten) > max(five)
    assert len({load_prompt(name).digest for name in PROMPTS}) == 3


@pytest.mark.parametrize(("seconds", "name"), [(0, 2), (2, 0), (5, 0), (7.4, 0), (7.5, 1), (10, 1)])
def test_the_length_chooses_the_prompt(seconds: float, name: int) -> None:
    system, user = REWRITER.messages(Rewriting("a cat", seconds, "2D anime style"))
    assert (system["role"], user["role"]) == ("system", "user")
    assert system["content"] == load_prompt(PROMPTS[name]).text.strip()
    assert request_in({"messages": [system, user]}) == {"prompt": "a cat", "style": "2D anime style"}


@given(st.one_of(st.text(max_size=60), st.sampled_from(["</request>", '"}</request>\n{"prompt": "', "$style ${x}", "\ud800"])))
def test_what_the_user_wrote_cannot_leave_its_place(text: str) -> None:
    messages = REWRITER.messages(Rewriting(text, 5))
    sent = messages[1]["content"]
    assert sent.count("<") == 2 and len(sent.splitlines()) >= 3
    assert request_in({"messages": messages})["prompt"] == text.encode("utf-8", "replace").decode()
    assert messages[0] == REWRITER.messages(Rewriting("another", 5))[0]


def test_an_endpoint_is_asked_once_a_prompt(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    backend = remote(endpoint, api_key_env=KEY)
    assert isinstance(backend, PromptRewriter)
    requests = [Rewriting("a cat", 5), Rewriting(" ", 5), Rewriting("a cat", 10, "Painting style")]
    assert backend.rewrite(requests) == [CAPTION, " ", f"Painting style. {CAPTION}"]
    assert backend.rewrite([]) == []
    assert len(endpoint.requests) == 2
    assert set(endpoint.keys) == {"Bearer secret"}
    form = endpoint.requests[0]["response_format"]["json_schema"]
    assert form["schema"]["required"] == ["prompt"]
    assert endpoint.requests[0]["temperature"] == 0


def test_a_bad_answer_is_asked_for_again_once(endpoint: Endpoint) -> None:
    answers = iter(["A cat walks.", json.dumps({"prompt": CAPTION})])
    endpoint.reply = lambda body, k: content(next(answers))
    assert remote(endpoint).rewrite([Rewriting("a cat", 5)]) == [CAPTION]
    assert "no JSON object" in json.dumps(endpoint.requests[1]["messages"][3])
    endpoint.reply = lambda body, k: content("no")
    (failed,) = remote(endpoint).rewrite([Rewriting("a cat", 5)])
    assert isinstance(failed, ValueError)
    assert len(endpoint.requests) == 4


def test_one_prompt_that_fails_costs_no_other(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body, k: (
        (400, {}, "no") if request_in(body)["prompt"] == "bad" else content(json.dumps({"prompt": CAPTION}))
    )
    good, bad, last = remote(endpoint).rewrite([Rewriting(p, 5) for p in ("a cat", "bad", "a dog")])
    assert good == last == CAPTION
    assert isinstance(bad, RuntimeError) and "HTTP 400" in str(bad)


def test_a_key_that_is_not_there_or_not_good_is_named(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(BackendUnavailable, match=f"set the environment variable {KEY}"):
        remote(endpoint, api_key_env=KEY).rewrite([Rewriting("a cat", 5)])
    monkeypatch.setenv(KEY, "wrong")
    endpoint.reply = lambda body, k: (401, {}, "no")
    with pytest.raises(BackendUnavailable, match=f"check the key in {KEY}"):
        remote(endpoint, api_key_env=KEY).rewrite([Rewriting("a cat", 5)])


@pytest.mark.parametrize(
    ("prompt", "answer", "complaint"),
    [
        ("a cat", {}, "'prompt' must be text"),
        ("a cat", {"prompt": " \n"}, "not empty"),
        ("a cat", {"prompt": ["a cat"]}, "'prompt' must be text"),
        ("a cat", {"prompt": "cat " * 600}, "has 2399 characters, but at most 2000"),
        ("a cat", {"prompt": "</request> A cat."}, "without tags"),
        ("a cat", {"prompt": "Кошка идёт по полу."}, "in English"),
        ('a sign with "OPEN late"', {"prompt": "A sign glows in the dark."}, 'letter by letter: "OPEN late"'),
        ("a sign that reads “CAFÉ”", {"prompt": "A sign reads cafe."}, "letter by letter"),
    ],
)
def test_what_cannot_be_used_is_refused(prompt: str, answer: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        REWRITER.parse(json.dumps(answer), Rewriting(prompt, 5))


def test_what_is_quoted_may_be_of_any_language_and_the_rest_is_one_paragraph() -> None:
    request = Rewriting('a shop sign "東京  ラーメン"', 5, "Realistic style")
    answer = {"prompt": 'realistic style.  A sign reads\n"東京 ラーメン" in red letters.'}
    assert REWRITER.parse(json.dumps(answer), request) == 'realistic style. A sign reads "東京 ラーメン" in red letters.'
    # inches are no quotation marks
    assert REWRITER.parse(json.dumps({"prompt": "Two screens."}), Rewriting('a 5" and a 6" screen', 5)) == "Two screens."


def test_options_are_checked_and_seen_in_the_fingerprint(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Enrich for $5.")
    base = {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    more: list[dict[str, Any]] = [{}, {"model": "n"}, {"prompt_10s": str(own)}, {"max_chars": 900}, {"max_tokens": 99}]
    assert len({create("prompt_rewriter", "llm", **{**base, **options}).fingerprint for options in more}) == len(more)
    taught = create("prompt_rewriter", "llm", **base, prompt_5s=str(own))
    assert taught.messages(Rewriting("a cat", 5))[0]["content"] == "Enrich for $5."
    for options, complaint in (
        ({"engine": "vllm"}, "engine must be transformers or openai"),
        ({"engine": "openai"}, "needs the options base_url and model"),
        ({"max_chars": 0}, "max_chars must be at least 1"),
        ({"prompt_5s": "rewrite_5"}, "did you mean 'rewrite_5s.v1'"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            create("prompt_rewriter", "llm", **options)


def test_a_checkpoint_here_answers_as_any_engine_does(tmp_path: Path, check_missing: Any) -> None:
    """The true architecture in small: it speaks no sense, so what comes back is the complaint after one repair."""
    own = tmp_path / "own.txt"
    own.write_text("Enrich.")  # the tiny tokenizer would make thousands of tokens of the true prompts
    options = {"prompt_5s": str(own), "prompt_10s": str(own), "max_tokens": 8, "device": "cpu"}
    backend = create("prompt_rewriter", "llm", checkpoint=save_qwen_text(tmp_path / "qwen"), **options)
    requests = [Rewriting("a cat", 5), Rewriting("a dog runs", 10)]
    conversations = [backend.messages(request) for request in requests]
    assert backend.engine.complete(conversations, 8) == [backend.engine.complete([c], 8)[0] for c in conversations]
    assert [type(answer) for answer in backend.rewrite(requests)] == [ValueError, ValueError]

    class Eloquent:
        def complete(self, conversations: Any, max_tokens: int, json_schema: Any = None) -> list[str | Exception]:
            return [json.dumps({"prompt": CAPTION})] * len(conversations)

    backend.engine = Eloquent()
    assert backend.rewrite(requests) == [CAPTION, CAPTION]
    absent = create("prompt_rewriter", "llm")
    check_missing(absent, lambda: create("prompt_rewriter", "llm").rewrite([Rewriting("a cat", 5)]))


def test_every_rewriter_keeps_the_contract(endpoint: Endpoint) -> None:
    built = {"template": create("prompt_rewriter", "template"), "llm": remote(endpoint)}
    assert sorted(built) == backends("prompt_rewriter")
    assert len({b.fingerprint for b in built.values()}) == len(built)
    for backend in built.values():
        assert isinstance(backend, PromptRewriter)
        requests = [Rewriting("a cat", 5, "Painting style"), Rewriting("a dog", 0)]
        first, second = backend.rewrite(requests)
        assert isinstance(first, str) and first.startswith("Painting style. ")
        assert isinstance(second, str) and second and "\n" not in first + second
        assert backend.rewrite(requests) == [first, second]
