"""What answers conversations: a checkpoint loaded here through transformers, or an OpenAI-compatible endpoint.

The HTTP client is httpx2, the maintained line of httpx: typed, thread-safe, and already there wherever transformers is
(huggingface_hub stands on it), so asking an endpoint brings no package of its own. Retries are ours, for its transports
retry connections only, and a row must learn why it failed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from waver_core.backends.pretrained._chat import Conversation, Schema, text_part, wire
from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.errors import BackendUnavailable
from waver_core.isolation import isolated

S = TypeVar("S")
T = TypeVar("T")
_BUSY = frozenset({408, 409, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0


class TransformersChat:
    """Greedy answers of a checkpoint, in left-padded batches, so that a row's answer does not depend on its neighbours.

    The schema is not enforced here: transformers has no constrained decoding of its own. What comes is parsed and repaired.
    """

    def __init__(self, host: Pretrained, folder: Path, reads_images: bool, media_options: Mapping[str, Any]) -> None:
        self._host, self._folder, self._reads_images, self._media_options = host, folder, reads_images, media_options

    @cached_property
    def _processor(self) -> Any:
        transformers = self._host.module("transformers")
        kind = transformers.AutoProcessor if self._reads_images else transformers.AutoTokenizer
        return kind.from_pretrained(self._folder, local_files_only=True)

    @cached_property
    def _model(self) -> Any:
        transformers = self._host.module("transformers")
        kind = transformers.AutoModelForImageTextToText if self._reads_images else transformers.AutoModelForCausalLM
        model = kind.from_pretrained(self._folder, dtype=self._host.dtype, local_files_only=True)
        return model.to(self._host.device).eval()

    def complete(
        self, conversations: Sequence[Conversation], max_tokens: int, json_schema: Schema | None = None
    ) -> list[str | Exception]:
        """See `ChatEngine`."""
        model, processor = self._model, self._processor  # a checkpoint that cannot be loaded is no fault of a row
        answers: list[str | Exception] = []
        for part in self._host.batches(len(conversations)):
            answers += isolated(lambda batch: self._generate(model, processor, batch, max_tokens), conversations[part])
        return answers

    def _generate(self, model: Any, processor: Any, conversations: Sequence[Conversation], max_tokens: int) -> list[str]:
        torch = self._host.module("torch")
        plain = [self._for_template(conversation) for conversation in conversations]
        prompts = [processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in plain]
        # The template has written every special token, the first one included.
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
        images = [_images(conversation) for conversation in conversations]
        if any(images):
            options |= {"images": images, **self._media_options}
        inputs = processor(text=prompts, **options).to(self._host.device)
        tokenizer = getattr(processor, "tokenizer", processor)
        with torch.inference_mode():
            tokens = model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _for_template(self, conversation: Conversation) -> Conversation:
        """Templates of models that see take parts, templates of models that do not take text."""
        if self._reads_images:
            return [
                {**m, "content": [text_part(m["content"])] if isinstance(m["content"], str) else m["content"]}
                for m in conversation
            ]
        return [
            {**m, "content": m["content"] if isinstance(m["content"], str) else "\n".join(p["text"] for p in m["content"])}
            for m in conversation
        ]


def _images(conversation: Conversation) -> list[Any]:
    return [
        part["image"]
        for message in conversation
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


class OpenAIChat:
    """Answers of an endpoint that speaks OpenAI's `/chat/completions`, several conversations at a time.

    A busy or failing server (429, 5xx, connection, timeout) is asked again up to `attempts` times, after the time that it
    names in Retry-After (at most a minute) or a doubling pause; what fails for good is an exception on its row. A key or an
    address that is refused (401, 404) would fail every row alike and raises `BackendUnavailable`.
    """

    def __init__(
        self,
        httpx: Any,
        *,
        base_url: str,
        model: str,
        api_key_env: str = "",
        structured: bool = True,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        attempts: int = 5,
        pause_s: float = 1.0,
    ) -> None:
        self._httpx, self._url, self._model = httpx, base_url.rstrip("/") + "/chat/completions", model
        self._structured, self._concurrency, self._attempts, self._pause_s = structured, concurrency, attempts, pause_s
        self._key_env = api_key_env
        headers = {}
        if api_key_env:
            key = os.environ.get(api_key_env)
            if not key:
                raise BackendUnavailable(f"the endpoint {base_url} needs a key: set the environment variable {api_key_env}")
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx.Client(headers=headers, timeout=timeout_s, limits=limits)

    def complete(
        self, conversations: Sequence[Conversation], max_tokens: int, json_schema: Schema | None = None
    ) -> list[str | Exception]:
        """See `ChatEngine`."""
        extra: dict[str, Any] = {"model": self._model, "temperature": 0, "max_tokens": max_tokens}
        if json_schema is not None and self._structured:
            form = {"name": "answer", "strict": True, "schema": dict(json_schema)}
            extra["response_format"] = {"type": "json_schema", "json_schema": form}
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="chat") as pool:
            return list(pool.map(lambda conversation: self._one(conversation, extra), conversations))

    def _one(self, conversation: Conversation, extra: Mapping[str, Any]) -> str | Exception:
        body = {**extra, "messages": wire(conversation)}
        error, wait_s = RuntimeError("not asked"), 0.0
        for attempt in range(self._attempts):
            time.sleep(wait_s)
            wait_s = min(_LONGEST_WAIT_S, self._pause_s * 2**attempt) * random.uniform(0.75, 1.25)
            try:
                response = self._client.post(self._url, json=body)
            except self._httpx.TransportError as failure:
                error = RuntimeError(f"{self._url}: {type(failure).__name__}: {failure}")
                continue
            if response.status_code == 200:
                return _content(response, self._url)
            error = RuntimeError(f"{self._url}: HTTP {response.status_code}: {response.text[:300]}")
            if response.status_code in (401, 404):
                key = f"the key in {self._key_env}" if self._key_env else "the address, the model's name or a missing api_key_env"
                raise BackendUnavailable(f"{error} (check {key})")
            if response.status_code not in _BUSY:
                return error
            asked_s = _retry_after_s(response.headers.get("retry-after"))
            wait_s = wait_s if asked_s is None else asked_s
        return error


def _content(response: Any, url: str) -> str | Exception:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    return content if isinstance(content, str) else RuntimeError(f"{url}: no answer in {response.text[:300]}")


def _retry_after_s(value: str | None) -> float | None:
    """Seconds to wait that a Retry-After header (a number or a date) asks for, a minute at most."""
    if not value:
        return None
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(wait_s, 0.0), _LONGEST_WAIT_S)
