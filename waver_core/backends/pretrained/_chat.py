"""Conversations with language models, whatever runs them: messages, JSON answers, and one repair before giving up.

A conversation is a list of OpenAI-style messages whose content is text or a list of parts; here an image part is
`{"type": "image", "image": uint8 [H, W, 3] RGB}`. `wire` turns it into what travels over HTTP and what vLLM takes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import cv2
import numpy as np

from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import ConfigError
from waver_core.prompts import Prompt

Conversation = list[dict[str, Any]]
Schema = Mapping[str, Any]
T = TypeVar("T")
ENGINES = ("transformers", "openai", "vllm")
_JPEG_QUALITY = 90
_QUOTED_CHARS = 4000


class ChatEngine(Protocol):
    """Something that answers conversations."""

    def complete(
        self, conversations: Sequence[Conversation], max_tokens: int, json_schema: Schema | None = None
    ) -> list[str | Exception]:
        """One answer per conversation, in order; one that cannot be had gives the exception that says why.

        json_schema: what the answer must look like, for engines that can enforce it; the others go by the prompt.
        """


def text_part(text: str) -> dict[str, Any]:
    """A part of a message that is text."""
    return {"type": "text", "text": text}


def image_part(frame: np.ndarray) -> dict[str, Any]:
    """A part of a message that is a picture, uint8 [H, W, 3] RGB."""
    return {"type": "image", "image": frame}


def wire(conversation: Conversation) -> Conversation:
    """The conversation as plain JSON in OpenAI's chat format: pictures become JPEG data URLs."""
    return [{**message, "content": _wire_content(message["content"])} for message in conversation]


def _wire_content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": _jpeg_url(part["image"])}} if part["type"] == "image" else part
        for part in content
    ]


def _jpeg_url(frame: np.ndarray) -> str:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise ValueError(f"a frame of shape {frame.shape} cannot be written as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def json_object(text: str) -> dict[str, Any]:
    """The first JSON object in an answer, past a code fence or a sentence before it; `ValueError` says what is wrong."""
    start = text.find("{")
    if start < 0:
        raise ValueError("the answer holds no JSON object")
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"the answer is not valid JSON: {error.msg} at character {error.pos - start}") from error
    except RecursionError:
        raise ValueError("the answer is not valid JSON: it nests without end") from None
    # Half of a surrogate pair is legal in JSON and in no file: it becomes a question mark.
    kept: dict[str, Any] = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return kept


def text_field(value: Mapping[str, Any], key: str) -> str:
    """A field that must be text and not blank, with its white space tidied."""
    text = value.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"'{key}' must be text and not empty")
    return " ".join(text.split())


def filled(prompt: Prompt, **values: str) -> str:
    """A prompt with its placeholders filled in, without the white space around it; `ConfigError` for one that is unknown."""
    try:
        return prompt.fill(**values).strip()
    except (KeyError, ValueError) as error:
        known = ", ".join(f"${name}" for name in values)
        raise ConfigError(f"the prompt {prompt.name} has a placeholder that is not one of {known}: {error}") from error


def object_schema(**properties: Schema) -> dict[str, Any]:
    """JSON schema of an object with just these fields, all of them required (what strict decoders ask for)."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def repair_messages(messages: Conversation, answer: str, complaint: str) -> Conversation:
    """The conversation carried on: the answer that was no good, and what was wrong with it."""
    ask = f"That answer cannot be used: {complaint}. Answer the question again, in the form asked for, and with nothing else."
    return [
        *messages,
        {"role": "assistant", "content": [text_part(answer[:_QUOTED_CHARS] or "(nothing)")]},
        {"role": "user", "content": [text_part(ask)]},
    ]


def ask(
    engine: ChatEngine,
    conversations: Sequence[Conversation],
    parse: Callable[[int, str], T],
    max_tokens: int,
    json_schema: Schema | None = None,
) -> list[T | Exception]:
    """Complete, parse (given the conversation's index and the answer), and ask once more where parsing raised `ValueError`.

    What fails twice stays an exception, and so does what the engine could not answer.
    """
    results: list[T | Exception] = []
    again: dict[int, Conversation] = {}
    for k, answer in enumerate(engine.complete(conversations, max_tokens, json_schema)):
        results.append(_parsed(answer, k, parse))
        if isinstance(answer, str) and isinstance(results[k], Exception):
            again[k] = repair_messages(conversations[k], answer, str(results[k]))
    if again:
        for k, answer in zip(again, engine.complete(list(again.values()), max_tokens, json_schema), strict=True):
            results[k] = _parsed(answer, k, parse)
    return results


def _parsed(answer: str | Exception, k: int, parse: Callable[[int, str], T]) -> T | Exception:
    if isinstance(answer, Exception):
        return answer
    try:
        return parse(k, answer)
    except ValueError as error:
        return error.with_traceback(None)  # whose frames would keep the pictures


class ChatBackend(Pretrained):
    """Base of backends that hold conversations.

    engine: "transformers" loads the checkpoint here; "openai" asks an endpoint that speaks OpenAI's chat dialect (then no
    checkpoint and no torch is needed); "vllm" leaves the asking to the funnel's executor, which uses the pure parts:
    `messages`, `json_schema`, `max_tokens`, `parse` and `repair_messages`.
    base_url, model: the endpoint and the name it knows the model by. api_key_env: the NAME of the environment variable that
    holds its key; empty for an endpoint without one. structured: whether the endpoint is sent the JSON schema.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    known: ClassVar[tuple[Checkpoint, ...]] = ()
    """Checkpoints of which size and licence are known."""
    name: ClassVar[str] = ""
    reads_images: ClassVar[bool] = True
    media_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the checkpoint's processor, beyond its own configuration."""

    def __init__(
        self,
        *,
        checkpoint: str,
        max_tokens: int,
        revision: str | None = None,
        engine: str = "transformers",
        base_url: str = "",
        model: str = "",
        api_key_env: str = "",
        structured: bool = True,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        attempts: int = 5,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 4,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        if engine not in ENGINES:
            raise ConfigError(f"{self.name}: engine must be one of {', '.join(ENGINES)}, not '{engine}'")
        if engine == "openai" and not (base_url and model):
            raise ConfigError(f"{self.name}: the engine openai needs the options base_url and model")
        self.checkpoint = known_or(checkpoint, self.known, revision)
        self.max_tokens, self.engine_name = max_tokens, engine
        if engine == "openai":
            self.packages = ("httpx2",)  # type: ignore[misc]  # all that this one needs
        self._endpoint: dict[str, Any] = {
            "base_url": base_url,
            "model": model,
            "api_key_env": api_key_env,
            "structured": structured,
            "concurrency": concurrency,
            "timeout_s": timeout_s,
            "attempts": attempts,
        }

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoint, unless an endpoint has it."""
        return () if self.engine_name == "openai" else (self.checkpoint,)

    def chat_identity(self, *prompts: Prompt, **parameters: Any) -> str:
        """The fingerprint. An engine of our own leaves no trace in it; of an endpoint only the model's name is known."""
        named = {"model": self._endpoint["model"]} if self.engine_name == "openai" else {}
        asked = ",".join(f"{prompt.name}:{prompt.digest}" for prompt in prompts)
        return self.identity(f"{self.name}-1", **named, prompts=asked, **parameters, max_tokens=self.max_tokens)

    @cached_property
    def engine(self) -> ChatEngine:
        """What answers; made at the first use, inside the worker."""
        from waver_core.backends.pretrained import _chat_engines as engines

        if self.engine_name != "vllm":
            self.require()
        if self.engine_name == "openai":
            return engines.OpenAIChat(self.module("httpx2"), **self._endpoint)
        if self.engine_name == "transformers":
            return engines.TransformersChat(self, self.checkpoint.locate(), self.reads_images, self.media_options)
        raise ConfigError(f"{self.name}: the engine vllm runs inside the funnel's executor, not by direct calls")

    @staticmethod
    def repair_messages(messages: Conversation, answer: str, complaint: str) -> Conversation:
        """See `repair_messages` of this module."""
        return repair_messages(messages, answer, complaint)
