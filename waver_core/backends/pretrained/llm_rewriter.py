"""Prompts rewritten by a large language model (Waver §4.6: GPT-4.1): an OpenAI-compatible endpoint, or a checkpoint here.

There are two system prompts for videos, about 5 and about 10 seconds long, and one for images. What the user wrote travels as
JSON between tags that it cannot close, and the system prompt says that it is no instruction. An answer is checked for what
can be checked: one English text, not too long, with every quotation of the prompt in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from waver_core.backends.contracts import Rewriting
from waver_core.backends.pretrained._chat import Conversation, ask, json_object, object_schema, text_field
from waver_core.backends.pretrained._chat_backend import ChatBackend
from waver_core.checkpoints import Checkpoint
from waver_core.errors import ConfigError
from waver_core.prompts import Prompt, load_prompt
from waver_core.registry import register

LONG_S = 7.5
"""From here on a video is nearer to 10 s than to 5 s."""
_QUOTED = re.compile(r'(?<!\w)"([^"]{1,200})"|“([^“”]{1,200})”')
_LATIN_END = "\u0250"
_MIN_ENGLISH = 0.9
"""Share of an answer's letters, quotations apart, that are Latin ones."""


@register("prompt_rewriter", "llm")
class LlmRewriter(ChatBackend):
    """Any chat model; Qwen2.5-7B-Instruct where it runs here. Options: the three prompts, `max_chars`, and those of
    `ChatBackend`; engine "openai" needs base_url, model and, for an endpoint with a key, api_key_env.

    A request waits for its prompt, so an endpoint is asked twice at most, and given up after `timeout_s`.
    """

    name = "llm_rewriter"
    reads_images = False
    known = (
        Checkpoint("Qwen/Qwen2.5-0.5B-Instruct", 1_000, "Apache-2.0"),
        Checkpoint("Qwen/Qwen2.5-7B-Instruct", 15_243, "Apache-2.0"),
        Checkpoint("Qwen/Qwen2.5-14B-Instruct", 29_552, "Apache-2.0"),
        Checkpoint("Qwen/Qwen2.5-32B-Instruct", 65_540, "Apache-2.0"),
    )

    def __init__(
        self,
        *,
        checkpoint: str = "Qwen/Qwen2.5-7B-Instruct",
        prompt_5s: str = "rewrite_5s.v1",
        prompt_10s: str = "rewrite_10s.v1",
        prompt_image: str = "rewrite_image.v1",
        max_chars: int = 2000,
        max_tokens: int = 512,
        timeout_s: float = 20.0,
        attempts: int = 2,
        **chat: Any,
    ) -> None:
        super().__init__(checkpoint=checkpoint, max_tokens=max_tokens, timeout_s=timeout_s, attempts=attempts, **chat)
        if self.engine_name == "vllm":
            raise ConfigError(f"{self.name}: engine must be transformers or openai; vLLM's own server is asked through openai")
        if max_chars < 1:
            raise ConfigError(f"max_chars must be at least 1, not {max_chars}")
        self._prompts = load_prompt(prompt_5s), load_prompt(prompt_10s), load_prompt(prompt_image)
        self._max_chars = max_chars
        self._one_at_a_time = Lock()
        self.fingerprint = self.chat_identity(*self._prompts, max_chars=max_chars)

    @property
    def json_schema(self) -> Mapping[str, Any]:
        """What an answer must look like."""
        return object_schema(prompt={"type": "string"})

    def system_prompt(self, seconds: float) -> Prompt:
        """The one for the length: images (0 s), about 5 s, about 10 s."""
        if seconds <= 0:
            return self._prompts[2]
        return self._prompts[0] if seconds < LONG_S else self._prompts[1]

    def messages(self, request: Rewriting) -> Conversation:
        """What the model is asked. A "<" of the user's is written as an escape, so that no tag ends but ours."""
        said = {"prompt": request.prompt, "style": request.style_words.strip()}
        data = json.dumps(said, ensure_ascii=False).replace("<", "\\u003c").encode("utf-8", "replace").decode()
        return [
            {"role": "system", "content": self.system_prompt(request.seconds).text.strip()},
            {"role": "user", "content": f"<request>\n{data}\n</request>"},
        ]

    def parse(self, text: str, request: Rewriting) -> str:
        """The new prompt, style words first; `ValueError` says what is wrong with the answer."""
        prompt = request.tagged(text_field(json_object(text), "prompt"))
        if len(prompt) > self._max_chars:
            raise ValueError(f"'prompt' has {len(prompt)} characters, but at most {self._max_chars} are allowed")
        if "<request" in prompt or "</request" in prompt:
            raise ValueError("'prompt' must hold the caption alone, without tags")
        lost = [words for words in _quotations(request.prompt) if words.casefold() not in prompt.casefold()]
        if lost:
            raise ValueError(f"'prompt' must hold these words letter by letter: {json.dumps(lost[0], ensure_ascii=False)}")
        letters = [c for c in _QUOTED.sub("", prompt) if c.isalpha()]
        if sum(c < _LATIN_END for c in letters) < _MIN_ENGLISH * len(letters):
            raise ValueError("'prompt' must be in English")
        return prompt

    def rewrite(self, requests: Sequence[Rewriting]) -> list[str | Exception]:
        """See `PromptRewriter`. A blank prompt is nothing to enrich and comes back as it is."""
        results: list[str | Exception] = [request.tagged(request.prompt) for request in requests]
        places = [k for k, request in enumerate(requests) if request.prompt.strip()]
        if not places:
            return results
        conversations = [self.messages(requests[k]) for k in places]
        if self.engine_name == "openai":
            answers = self._asked(conversations, [requests[k] for k in places])
        else:  # several threads may call, and must not load the checkpoint twice
            with self._one_at_a_time:
                answers = self._asked(conversations, [requests[k] for k in places])
        for k, answer in zip(places, answers, strict=True):
            results[k] = answer
        return results

    def _asked(self, conversations: Sequence[Conversation], requests: Sequence[Rewriting]) -> list[str | Exception]:
        return ask(self.engine, conversations, lambda k, text: self.parse(text, requests[k]), self.max_tokens, self.json_schema)


def _quotations(text: str) -> list[str]:
    """The words in double quotation marks, their white space tidied."""
    return [" ".join((a or b).split()) for a, b in _QUOTED.findall(text) if (a or b).strip()]
