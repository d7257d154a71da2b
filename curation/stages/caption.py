"""Caption (Waver §3.3): what a clip shows, in sentences, with the spans of its sub-actions, the camera's move and positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from curation import stage
from curation.stage import BackendUse, ClipMedia, FrameRequest, Row
from waver_core.backends.contracts import Caption, Captioner, ClipView
from waver_core.config import Strict
from waver_core.manifest import Column
from waver_core.registry import backend_class

_ACTIONS = pa.list_(pa.struct([("text", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64())]))


class Options(Strict):
    """Which captioner, and the frames it sees: those of the motion stage, and those in which the overlay stage finds text."""

    backend: str = "attributes"
    backend_options: dict[str, Any] = {}
    short_side_px: int = Field(192, ge=64)
    fps: float = Field(6.0, gt=0)
    text_frames: int = Field(3, ge=1)
    text_short_side_px: int = Field(360, ge=64)


class Stage(stage.Stage):
    """Captions from the configured backend."""

    name = "caption"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("clip",)
    columns = (
        Column("caption", pa.string(), "what the clip shows, several sentences"),
        Column("caption_short", pa.string(), "the same in one sentence, in the manner of a prompt"),
        Column("caption_actions", _ACTIONS, "sub-actions with their spans from the clip's start", "s"),
        Column("caption_camera", pa.string(), "static, pan_*, tilt_*, zoom_*, shake or complex"),
        Column("caption_style", pa.string(), "style tag, empty where it is not known"),
        Column("caption_spatial", pa.list_(pa.string()), "how things lie to one another, from the viewer's side"),
    )

    def backends(self) -> list[BackendUse]:
        """The captioner."""
        return [BackendUse("captioner", self.options.backend, self.options.backend_options)]

    @cached_property
    def _captioner(self) -> Captioner:
        captioner: Captioner = self.backends()[0].create()
        return captioner

    @property
    def language_model(self) -> Any:
        """The captioner."""
        return self._captioner

    @property
    def uses(self) -> tuple[str, ...]:
        """Columns of earlier stages that the captioner looks at."""
        return tuple(getattr(backend_class("captioner", self.options.backend), "uses", ()))

    def requests(self) -> tuple[FrameRequest, ...]:
        """Dense small frames for motion, a few larger ones for text."""
        o = self.options
        return (FrameRequest(o.short_side_px, fps=o.fps), FrameRequest(o.text_short_side_px, count=o.text_frames))

    def score_many(self, media: Sequence[ClipMedia]) -> list[Row | Exception]:
        """Caption columns, or what the backend gives in their place, for every clip."""
        dense, large = self.requests()
        views = [ClipView(m.frames[dense].rgb, m.frames[dense].times_s, m.row, m.frames[large].rgb) for m in media]
        return [found if isinstance(found, Exception) else _columns(found) for found in self._captioner.caption(views)]


def _columns(found: Caption) -> Row:
    return {
        "caption": found.text,
        "caption_short": found.short,
        "caption_actions": [action._asdict() for action in found.sub_actions],
        "caption_camera": found.camera,
        "caption_style": found.style,
        "caption_spatial": list(found.spatial),
    }
