"""Captions from a chat model (Waver §3.3): what it is shown and asked, and how its answer is checked.

A clip goes in as pictures, each with its time in front, so that any engine can take it and the model can say when a
sub-action starts and ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeGuard

from waver_core.backends.contracts import STYLES, Caption, ClipView, SubAction
from waver_core.backends.pretrained._chat import (
    Conversation,
    ask,
    filled,
    image_part,
    json_object,
    object_schema,
    text_field,
    text_part,
    wire,
)
from waver_core.backends.pretrained._chat_backend import ChatBackend
from waver_core.backends.pretrained._frames import sample, span_of
from waver_core.camera import LABELS
from waver_core.errors import ConfigError
from waver_core.prompts import load_prompt

OVERSHOOT_S = 0.5
"""How far a sub-action may reach beyond the clip before it counts as wrong: one step between frames at 2 fps."""
_TEXT = {"type": "string"}
_SPAN = object_schema(text=_TEXT, start_s={"type": "number"}, end_s={"type": "number"})
SCHEMA = object_schema(
    caption=_TEXT,
    short_caption=_TEXT,
    sub_actions={"type": "array", "items": _SPAN},
    camera={"type": "string", "enum": list(LABELS)},
    style={"type": "string", "enum": list(STYLES)},
    spatial_relations={"type": "array", "items": _TEXT},
)


class ChatCaptioner(ChatBackend):
    """Base of captioners that hold conversations.

    frames, fps: at most this many frames, at this rate. short_side_px: what they are shrunk to. prompt, image_prompt: for
    clips and for images, a name or a file each.
    answer: "json" asks for everything at once; "text" takes a plain paragraph for the caption, for models too small to
    keep to a form: its first sentence is the short caption, the camera label is the measured one of the clip's row (column
    `motion_camera`, without which the clip is an error), and there are no sub-actions, style or spatial relations.
    """

    uses: ClassVar[tuple[str, ...]] = ("motion_camera",)

    def __init__(
        self,
        *,
        prompt: str,
        image_prompt: str,
        frames: int = 20,
        fps: float = 2.0,
        short_side_px: int = 360,
        answer: str = "json",
        max_tokens: int = 1024,
        **chat: Any,
    ) -> None:
        super().__init__(max_tokens=max_tokens, **chat)
        if frames < 1 or fps <= 0 or short_side_px < 1 or answer not in ("json", "text"):
            raise ConfigError(f"{self.name}: frames, fps and short_side_px must be positive, answer json or text")
        self.prompt, self.image_prompt = load_prompt(prompt), load_prompt(image_prompt)
        self.frames, self.fps, self.short_side_px, self.answer = frames, fps, short_side_px, answer
        self.json_schema: Mapping[str, Any] | None = SCHEMA if answer == "json" else None
        seen = f"{frames}x{fps:g}fps,{short_side_px}px"
        self.fingerprint = self.chat_identity(self.prompt, self.image_prompt, frames=seen, answer=answer)

    def conversation(self, view: ClipView) -> Conversation:
        """What the model is shown and asked; raises `ValueError` for a clip without frames."""
        seen = sample(view, self.frames, self.fps, self.short_side_px)
        if view.row.get("kind") == "image":
            question = filled(self.image_prompt, camera_labels=", ".join(LABELS), styles=", ".join(STYLES))
            return [{"role": "user", "content": [image_part(seen.rgb[0]), text_part(question)]}]
        parts = []
        for frame, time_s in zip(seen.rgb, seen.times_s, strict=True):
            parts += [text_part(f"Frame at {time_s:.1f} s:"), image_part(frame)]
        question = filled(
            self.prompt,
            frames=str(len(seen.rgb)),
            duration=f"{seen.duration_s:.1f}",
            camera_labels=", ".join(LABELS),
            styles=", ".join(STYLES),
        )
        return [{"role": "user", "content": [*parts, text_part(question)]}]

    def messages(self, view: ClipView) -> Conversation:
        """The conversation in OpenAI's chat format, pictures as data URLs."""
        return wire(self.conversation(view))

    def parse(self, text: str, view: ClipView) -> Caption:
        """The answer checked against the contract; `ValueError` says what is wrong with it, in words for the model."""
        if self.answer == "text":
            still = view.row.get("kind") == "image"
            return _from_paragraph(text, "static" if still else view.row.get("motion_camera"))
        value = json_object(text)
        camera = text_field(value, "camera")
        if camera not in LABELS:
            raise ValueError(f"'camera' must be one of {', '.join(LABELS)}, not '{camera}'")
        style = text_field(value, "style")
        if style not in STYLES:
            raise ValueError(f"'style' must be one of {', '.join(STYLES)}, not '{style}'")
        duration_s = span_of(view)[1]
        return Caption(
            text=text_field(value, "caption"),
            short=text_field(value, "short_caption"),
            sub_actions=tuple(_sub_action(item, duration_s) for item in _list(value, "sub_actions")),
            camera=camera,
            style=style,
            spatial=tuple(
                text_field({"spatial_relations": item}, "spatial_relations") for item in _list(value, "spatial_relations")
            ),
        )

    def caption(self, clips: Sequence[ClipView]) -> list[Caption | Exception]:
        """See `Captioner`."""
        results: list[Caption | Exception] = [ValueError("not asked")] * len(clips)
        conversations: dict[int, Conversation] = {}
        for k, clip in enumerate(clips):
            try:
                conversations[k] = self.conversation(clip)
            except ValueError as error:
                results[k] = error.with_traceback(None)  # whose frames would keep the pictures
        places = list(conversations)
        answers = ask(
            self.engine,
            list(conversations.values()),
            lambda n, text: self.parse(text, clips[places[n]]),
            self.max_tokens,
            self.json_schema,
        )
        for k, answer in zip(places, answers, strict=True):
            results[k] = answer
        return results


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    items = value.get(key)
    if not isinstance(items, list):
        raise ValueError(f"'{key}' must be a list, which may be empty")
    return items


def _sub_action(item: Any, duration_s: float) -> SubAction:
    """One sub-action with 0 <= start < end <= duration, reaching over an edge by `OVERSHOOT_S` at most, which is cut off."""
    if not isinstance(item, dict):
        raise ValueError("every entry of 'sub_actions' must have text, start_s and end_s")
    text, start, end = text_field(item, "text"), item.get("start_s"), item.get("end_s")
    if not _number(start) or not _number(end):
        raise ValueError(f"start_s and end_s of '{text}' must be numbers of seconds")
    # Compared before anything is cut off, so that what is no number at all (NaN) fails as well.
    if not (-OVERSHOOT_S <= start < end <= duration_s + OVERSHOOT_S and start < duration_s and end > 0):
        raise ValueError(f"'{text}' lasts from {start} to {end} s, but the clip from 0 to {duration_s:.1f} s")
    return SubAction(text, max(0.0, float(start)), min(duration_s, float(end)))


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _from_paragraph(text: str, camera: Any) -> Caption:
    caption = " ".join(text.split())
    if not caption:
        raise ValueError("the answer is empty")
    if camera not in LABELS:
        raise ValueError("the clip's row has no measured camera label (column motion_camera), and answers in text give none")
    return Caption(caption, re.split(r"(?<=[.!?])\s", caption, maxsplit=1)[0], (), camera, "", ())
