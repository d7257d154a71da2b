"""A detector for each of the thirteen quality issues: the embedded stand-in for the fine-tuned MLLM of Waver §3.2.

Each detector is a measurement with a known cause, turned into a probability by a logistic curve whose middle lies between
what clean and spoilt clips measure; curves were set on rendered clips and checked against real footage by eye. What a
detector cannot see stands beside it. Evidence of earlier stages is taken from the clip's row where it is there (bars,
text, watermark, and the full-rate signals of `waver_core.tempo`, without which tempo and jumps cannot be judged and count
as absent); the rest is measured on the frames, so bare frames get an answer too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from waver_core.backends.contracts import ISSUES, ClipView, Quality, TextBox, TextDetector, WatermarkScorer
from waver_core.backends.embedded.issue_looks import Looks, looks_of
from waver_core.backends.embedded.issue_motion import Moves, moves_of
from waver_core.isolation import one_by_one
from waver_core.registry import create, register
from waver_core.tempo import COLUMNS, PREFIX

_ABSENT = 0.02
_WATERMARK_FRAMES = 32
_FAST_CAMERA_SPEED = 1.2
"""Short sides a second."""


@register("quality_judge", "issue_detectors")
class IssueDetectors:
    """About 75 ms a clip on one busy core; 25 ms more for each frame that is searched for text."""

    fingerprint = "issue_detectors-1"
    uses = (
        "technical_black_border_ratio",
        "aesthetic_score",
        "overlay_source_watermark",
        "overlay_watermark",
        "overlay_watermark_box",
        "overlay_text_area_ratio",
        "overlay_text_kind",
        "overlay_burned_in_area_ratio",
        "motion_total_px",
    )

    def __init__(self, text_backend: str | None = "rapidocr", text_frames: int = 2, fast_pace_per_s: float = 1.95) -> None:
        self._text_backend, self._text_frames, self._fast_pace_per_s = text_backend, text_frames, fast_pace_per_s

    @cached_property
    def _text(self) -> TextDetector:
        detector: TextDetector = create("text_detector", str(self._text_backend))
        return detector

    @cached_property
    def _watermark(self) -> WatermarkScorer:
        scorer: WatermarkScorer = create("watermark_scorer", "static_overlay")
        return scorer

    def judge(self, clips: Sequence[ClipView]) -> list[Quality | Exception]:
        """One verdict per clip, each on its own: a batch gives what its clips give one by one."""
        return one_by_one(self._judge, clips)

    def _judge(self, clip: ClipView) -> Quality:
        if not len(clip.rgb):
            raise ValueError("a clip without frames cannot be judged")
        looks = looks_of(clip.rgb)
        source = {name: clip.row.get(f"{PREFIX}{name}") for name in COLUMNS}
        issues = _of_looks(looks, source, clip.row) | self._of_overlays(clip)
        if clip.row.get("kind") != "image":
            issues |= _of_motion(moves_of(clip.rgb, clip.times_s), source, self._fast_pace_per_s)
        found = {name: float(issues.get(name, _ABSENT)) for name in ISSUES}
        return Quality(found, _high_quality(found, clip.row.get("aesthetic_score")))

    def _of_overlays(self, clip: ClipView) -> dict[str, float]:
        """Text and watermarks. Lettering that keeps its place is text, unless it is small and sits in a corner.

        A watermark or title over a picture that does not move cannot be told from the scene but by its lettering, so a
        logo without letters under a camera at rest is missed in a source of one shot.
        """
        burned = _burned_in_ratio(clip.row)
        boxes = self._boxes(clip.rgb) if self._text_backend and (burned is None or burned > 0) else []
        area = sum(box.area for box in boxes)
        in_corner = sum(box.area for box in boxes if _like_a_watermark(*box[:4])) / max(area, 1e-6)
        burned = area if burned is None else burned
        text = _chance(burned * (1 - in_corner), 0.012, 0.004)
        lettered = 0.85 if burned > 0 and in_corner > 0.5 else _ABSENT
        return {"text_overlay": text, "watermark": max(lettered, self._still_mark(clip))}

    def _still_mark(self, clip: ClipView) -> float:
        """Probability of something that stays still while the picture moves; less where no one puts a watermark.

        Over all shots of a source it need not be in a corner: there is no title that lasts so long.
        """
        if clip.row.get("overlay_source_watermark") is not None:
            return float(clip.row["overlay_source_watermark"])
        box = clip.row.get("overlay_watermark_box")
        probability = clip.row.get("overlay_watermark")
        if probability is None and clip.row.get("kind") != "image":
            found = self._watermark.score(clip.rgb[:: -(-len(clip.rgb) // _WATERMARK_FRAMES)])
            probability, box = found.probability, found.box
        if not probability:
            return _ABSENT
        return float(probability) * (1.0 if box is None or _like_a_watermark(*box) else 0.3)

    def _boxes(self, frames: np.ndarray) -> list[TextBox]:
        """Text boxes of the frame, among a few, that has the most text: subtitles pause."""
        picked = np.unique(np.linspace(0, len(frames) - 1, self._text_frames + 2).round().astype(int)[1:-1])
        return max((self._text.detect(frames[i]) for i in picked), key=lambda found: sum(box.area for box in found), default=[])


def _burned_in_ratio(row: Mapping[str, Any]) -> float | None:
    """Share of the picture under lettering that keeps its place, from the overlay stage; None where it has not looked.

    Where nothing moves all lettering keeps its place, so only as much counts as scene text seldom takes up.
    """
    if row.get("overlay_text_area_ratio") is None:
        return None
    if row.get("kind") == "image" or (row.get("motion_total_px") or 0.0) < 0.05:
        return max(0.0, float(row["overlay_text_area_ratio"]) - 0.04)
    return float(row.get("overlay_burned_in_area_ratio") or 0.0) if row.get("overlay_text_kind") == "burned_in" else 0.0


def _like_a_watermark(left: float, top: float, right: float, bottom: float) -> bool:
    """Whether a box (shares of the picture) is small and in a corner, where titles and subtitles are not."""
    x, y = (left + right) / 2, (top + bottom) / 2
    return abs(x - 0.5) > 0.12 and abs(y - 0.5) > 0.22 and (right - left) * (bottom - top) < 0.09


def _of_looks(looks: Looks, source: Mapping[str, float | None], row: Mapping[str, Any]) -> dict[str, float]:
    """Noise, bars, exposure, blur and colour cast.

    `low_visual_quality` is noise, in space and (where the full rate was seen) in time, so that a rough texture is none.
    `overexposed` wants light lost in colours, which white paper has not. `dark_or_blurry` calls a night dark only if it
    has no lights, and a picture soft only if nothing in it is sharp. `color_imbalance` cannot tell a tinted picture from
    a scene that is all one colour, such as a sunset or a dive.
    """
    border = row.get("technical_black_border_ratio")
    noise = _chance(np.log(max(looks.grain_levels, 0.1)), np.log(3.7), 0.2)
    if source["noise_levels"] is not None:
        noise = min(noise, _chance(np.log(max(source["noise_levels"], 0.1)), np.log(1.7), 0.25))
    blurry = _chance(looks.blur_px, 1.24, 0.09)
    dark = _chance(-looks.high_luma, -62.0, 10.0)
    return {
        "low_visual_quality": noise,
        # Of a black frame nobody can say where the picture begins.
        "black_border": min(
            1 - dark, _chance(looks.border_ratio if border is None else min(float(border), looks.border_ratio), 0.02, 0.008)
        ),
        "overexposed": min(_chance(looks.clipped_ratio, 0.2, 0.05), _chance(looks.half_clipped_ratio, 0.028, 0.008)),
        "dark_or_blurry": 1 - (1 - blurry) * (1 - dark),
        "color_imbalance": _chance(looks.light_saturation, 0.39, 0.03),
    }


def _of_motion(moves: Moves, source: Mapping[str, float | None], fast_pace_per_s: float) -> dict[str, float]:
    """Tempo, steadiness, and where the subject is.

    `slow_motion` and stutter need the full-rate columns; a high-speed camera's slow motion leaves no trace in them.
    `fast_motion` is a subject that covers twice its own length in a second, sustained, or a camera that sweeps over
    more than the picture's short side. That is speed alone: nothing tells footage that was sped up from action as fast, and
    the middle of the curve is where filmed action smears, so moderately sped-up footage passes.
    `perspective_change` is a jump within the clip, be it a cut that was missed. `image_animation` is a picture that one
    camera model explains wholly, subject and all: a pan over a landscape without depth or life passes for one.
    """
    factor = max(source["repeat_factor"] or 1.0, source["blend_factor"] or 1.0)
    pace, camera_speed = source["subject_pace"], source["camera_speed"]
    pace = moves.subject_pace if pace is None else pace
    camera_speed = moves.camera_speed if camera_speed is None else camera_speed
    fast = max(pace / fast_pace_per_s, camera_speed / _FAST_CAMERA_SPEED)
    if source["shake_short_sides"] is None:
        shake = 0.7 if moves.shaky else _ABSENT
    else:
        shake = _chance(np.log(max(source["shake_short_sides"], 1e-4)), np.log(0.009), 0.25)
    stutter = _chance(source["freeze_ratio"] or 0.0, 0.12, 0.04)
    animated = min(
        _chance(-moves.unexplained, -0.52, 0.06),
        _chance(-moves.subject_ratio, -0.01, 0.003),
        _chance(np.log(max(moves.camera_speed, 1e-3)), np.log(0.02), 0.2),
    )
    return {
        "slow_motion": 0.92 if factor > 1 else _ABSENT,
        "fast_motion": _chance(np.log(max(fast, 0.01)), 0.0, 0.15),
        "perspective_change": 0.95 if source["jumps"] else _ABSENT,
        "unstable_motion": max(shake, stutter),
        "subject_cutoff": _chance(moves.cut_off_ratio, 0.8, 0.08),
        "image_animation": animated,
    }


def _chance(value: float, middle: float, width: float) -> float:
    """Logistic curve: 0.5 in the middle, 0.88 one width above it."""
    return float(1 / (1 + np.exp(-np.clip(2 * (value - middle) / width, -30, 30))))


def _high_quality(issues: Mapping[str, float], aesthetic: float | None) -> float:
    """That no issue is there, were they independent; times the chance that the aesthetic score is above 4.5, if known."""
    clean = float(np.prod([1 - issues[name] for name in ISSUES]))
    return clean * (1.0 if aesthetic is None else _chance(float(aesthetic), 4.5, 0.75))
