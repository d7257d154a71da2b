"""Which frame of a video shows what: clean parts of shots, and the transitions between them."""

from __future__ import annotations

from dataclasses import dataclass

from waver_core.synthetic.scenes import Shot, Video


@dataclass(frozen=True)
class Span:
    """Frames ``[start_frame, end_frame)`` of the video.

    ``kind`` is "shot" or the kind of a transition; a cut is an empty span. ``before`` and ``after`` are indexes of
    shots: equal for a shot, None where the video begins or ends in black.
    """

    kind: str
    start_frame: int
    end_frame: int
    before: int | None
    after: int | None

    @property
    def n_frames(self) -> int:
        return self.end_frame - self.start_frame


def clean_frames(video: Video, shot: Shot) -> int:
    """Number of frames of the clean part of a shot, at least 1."""
    return max(1, round(shot.duration_s * video.fps))


def timeline(video: Video) -> list[Span]:
    """All spans of the video in order: shots and the transitions between them, cuts (empty spans) included."""
    spans: list[Span] = []
    at = 0

    def add(kind: str, n_frames: int, before: int | None, after: int | None) -> None:
        nonlocal at
        spans.append(Span(kind, at, at + n_frames, before, after))
        at += n_frames

    if video.fade_in_frames:
        add("fade_in", video.fade_in_frames, None, 0)
    for i, shot in enumerate(video.shots):
        if i:
            transition = video.transitions[i - 1]
            add(transition.kind, transition.duration_frames, i - 1, i)
        add("shot", clean_frames(video, shot), i, i)
    if video.fade_out_frames:
        add("fade_out", video.fade_out_frames, len(video.shots) - 1, None)
    return spans


def n_frames(video: Video) -> int:
    """Number of frames of the whole video."""
    return timeline(video)[-1].end_frame


def shot_margins(video: Video, index: int) -> tuple[int, int]:
    """Frames of the transitions before and after a shot: how far it runs beyond its clean part on either side."""
    lead = video.transitions[index - 1].duration_frames if index else video.fade_in_frames
    last = index == len(video.shots) - 1
    tail = video.fade_out_frames if last else video.transitions[index].duration_frames
    return lead, tail


def blend_weights(kind: str, step: int, n_steps: int) -> tuple[float, float, float]:
    """Weights (shot before, shot after, level of white) of blend ``step`` out of ``n_steps``.

    Neither shot ever has the whole weight, so that every frame of a transition is a blend: with ``u = (step + 1) /
    (n_steps + 1)`` a dissolve mixes ``1 - u`` and ``u``; a fade has its black (or white) frame at ``u = 0.5``.
    """
    u = (step + 1) / (n_steps + 1)
    if kind == "dissolve":
        return 1 - u, u, 0.0
    if kind == "fade_in":
        return 0.0, u, 0.0
    if kind == "fade_out":
        return 1 - u, 0.0, 0.0
    before, after = max(0.0, 1 - 2 * u), max(0.0, 2 * u - 1)
    return before, after, (1 - before - after if kind == "fade_white" else 0.0)
