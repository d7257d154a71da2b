"""A captioner that says only what it measured (Waver §3.3): no model, no guesses, and sentences that can be read back.

What it knows: main colours of the background, things of a clear colour and outline, things that move against the scene, their
directions, speeds and turns, the camera's move, light, and text. It knows no persons, no animals and no actions beyond motion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from waver_core.backends.contracts import Caption, ClipView, FlowEstimator, ForegroundSegmenter
from waver_core.captions.facts import SceneFacts
from waver_core.captions.measure import measure
from waver_core.captions.reading import TextReader
from waver_core.captions.sentences import full_text, short_text, spatial_sentences, sub_actions
from waver_core.isolation import one_by_one
from waver_core.registry import create, register


@register("captioner", "attributes")
class AttributeCaptioner:
    """Measured facts as sentences; some 70 ms for three seconds at 6 frames a second, and more where text is read.

    read_text: True reads always, False never, None where the row says that there is text (`overlay_text_area_ratio`).
    """

    uses = ("motion_camera", "overlay_text_area_ratio")

    def __init__(self, read_text: bool | None = None, min_text_confidence: float = 0.9) -> None:
        self._read_text = read_text
        self._flow: FlowEstimator = create("flow_estimator", "dis")
        self._segmenter: ForegroundSegmenter = create("foreground_segmenter", "residual")
        self._reader = TextReader(min_confidence=min_text_confidence)
        parts = (self._flow.fingerprint, self._segmenter.fingerprint, str(read_text), self._reader.fingerprint)
        self.fingerprint = "-".join(("attributes-1", *parts))

    def caption(self, clips: Sequence[ClipView]) -> list[Caption | Exception]:
        """One caption per clip, in order; a clip that cannot be captioned gives the exception that says why."""
        return one_by_one(self._caption, clips)

    def facts(self, clip: ClipView) -> SceneFacts:
        """What was measured of one clip: what its caption says, for comparison with a prompt (`captions.comparing`)."""
        if not len(clip.rgb):
            raise ValueError("the clip has no frames")
        start_s, end_s = _span_s(clip)
        still = clip.row.get("kind") == "image"
        rgb, times_s = (clip.rgb[:1], clip.times_s[:1]) if still else (clip.rgb, clip.times_s)
        camera = clip.row.get("motion_camera")
        found = measure(rgb, np.asarray(times_s, float) - start_s, end_s - start_s, self._flow, self._segmenter, camera)
        return SceneFacts(found.background, found.light, found.camera, found.objects, self._texts(clip))

    def _caption(self, clip: ClipView) -> Caption:
        facts = self.facts(clip)
        start_s, end_s = _span_s(clip)
        return Caption(
            text=full_text(facts),
            short=short_text(facts),
            sub_actions=sub_actions(facts, round(end_s - start_s, 2)),
            camera=_camera_column(clip.row, facts),
            style=str(clip.row.get("style") or ""),
            spatial=spatial_sentences(facts),
        )

    def _texts(self, clip: ClipView) -> tuple[str, ...]:
        wanted = self._read_text
        if wanted is None:
            wanted = (clip.row.get("overlay_text_area_ratio") or 0.0) > 0
        if not wanted:
            return ()
        frames = clip.large if clip.large is not None else clip.rgb
        n = len(frames)
        return self._reader.read(frames[[n // 6, n // 2, n - 1 - n // 6]] if n > 3 else frames)


def _span_s(clip: ClipView) -> tuple[float, float]:
    """Start and end of a clip: from its row, or from the frames' times, the last of which lasts as long as the others."""
    times = np.asarray(clip.times_s, float)
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    start_s, end_s = clip.row.get("start_s"), clip.row.get("end_s")
    return float(times[0]) if start_s is None else start_s, float(times[-1]) + step if end_s is None else end_s


def _camera_column(row: Mapping[str, Any], facts: SceneFacts) -> str:
    """The camera's label; "complex" where its move has no name."""
    return str(row.get("motion_camera") or facts.camera or "complex")
