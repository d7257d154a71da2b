"""Conversations with language models, whatever runs them: messages, JSON answers, and one repair before giving up.

A conversation is a list of OpenAI-style messages whose content is text or a list of parts; here an image part is
`{"type": "image", "image": uint8 [H, W, 3] RGB}`. `wire` turns it into what travels over HTTP and what vLLM takes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np

from waver_core.errors import ConfigError
from waver_core.prompts import Prompt

Conversation = list[dict[str, Any]]
Schema = Mapping[str, Any]
T = TypeVar("T")
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
