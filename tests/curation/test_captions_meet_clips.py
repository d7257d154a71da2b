"""Captions meet clips by id only: whatever is shuffled, run twice, fails or is run again, none is joined to another clip."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.funnel import FunnelResult
from curation.scores_pass import ScoresPass
from curation.serial import Serial
from waver_core.backends.contracts import ActionLabel, Caption, ClipView
from waver_core.errors import RunFailed
from waver_core.registry import register
from waver_core.synthetic import random_video, write_video

OPEN = tuple(
    f"tiers.192p.{gate}"
    for gate in ("static.min=0", "still_spells.min=0", "duplicate={column: kind, equals: video}", "text.max=9")
)


def colour_of(frames: np.ndarray) -> list[float]:
    """What tells the clips of this test apart: the mean colour of a frame in the middle of each quarter."""
    return [float(v) for frame in frames for v in frame.mean(axis=(0, 1))]


@register("captioner", "test_colours")
class ColourCaptioner:
    """Says the colours that it sees, and now and then fails: a clip, or the whole batch."""

    fingerprint = "test_colours-1"
    moods = random.Random(7)
    failures = 0
    batches: list[int] = []

    def caption(self, clips: Sequence[ClipView]) -> list[Caption | Exception]:
        type(self).batches.append(len(clips))
        if len(clips) > 1 and self.moods.random() < 0.4:
            type(self).failures += 1
            raise MemoryError("the batch does not fit")
        out: list[Caption | Exception] = []
        for clip in clips:
            out.append(Caption(" ".join(f"{v:.1f}" for v in in_quarters(clip.rgb)), "", (), "static", "", ()))
        return out


@register("action_labeler", "test_echo")
class EchoLabeler:
    """The caption itself as the label; one in six fails."""

    fingerprint = "test_echo-1"

    def label(self, captions: Sequence[str]) -> list[ActionLabel | Exception]:
        return [ValueError("no") if sum(map(ord, c)) % 6 == 0 else ActionLabel("a", "b", c) for c in captions]


class Unruly(Serial):
    """Takes units in any order, cuts them up, does some twice, and breaks down in the middle of a pass."""

    def __init__(self, seed: int, breaks: bool) -> None:
        self.random, self.breaks = random.Random(seed), breaks

    def run(self, factory: Any, args: Any, units: Sequence[pa.Table], resources: Any) -> Iterator[dict[str, Any]]:
        parts = list(units)
        if factory is ScoresPass:
            parts = [unit.slice(k, 2) for unit in units for k in range(0, len(unit), 2)]
            parts += self.random.sample(parts, k=len(parts) // 2)
        self.random.shuffle(parts)
        for number, row in enumerate(super().run(factory, args, parts, resources)):
            if self.breaks and factory is ScoresPass and number == len(parts) // 3:
                raise RunFailed("a machine went away")
            yield row


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for seed in range(5):
        video = random_video(
            seed + 20, n_shots=4, width_px=160, height_px=90, fps=12, transitions=("cut",), durations_s=(2.1, 2.5)
        )
        write_video(video, folder / f"video_{seed}.mp4")
    return folder


def test_none_is_misjoined(many: Path, tmp_path: Path, curate: Any, pictures_of: Any) -> None:
    settings = (
        *OPEN,
        "tiers.192p.size.min=16",
        "funnel.stages.caption={backend: test_colours}",
        "funnel.stages.label={backend: test_echo}",
        "funnel.passes.scores.clips_per_batch=3",
        "funnel.score_reference_frames_only=false",
    )
    for seed in range(3):
        with pytest.raises(RunFailed, match="went away"):
            curate(many, tmp_path, *settings, execute=Unruly(seed, breaks=True))
    result: FunnelResult = curate(many, tmp_path, *settings, execute=Unruly(9, breaks=False))
    rows = [r for r in result.clips.to_pylist() if r["caption"] is not None]
    assert len(rows) >= 16 and ColourCaptioner.failures >= 2 and max(ColourCaptioner.batches) == 2
    seen = np.array([in_quarters(pictures_of(r)) for r in rows])
    said = np.array([[float(v) for v in r["caption"].split()] for r in rows])
    distance = np.linalg.norm(seen[:, None] - said[None], axis=-1)
    assert (distance.argmin(axis=0) == np.arange(len(rows))).all() and np.diag(distance).max() < 6
    assert np.sort(distance, axis=0)[1].min() > 3 * np.diag(distance).max(), "the clips of this test look too much alike"
    labelled = [r for r in rows if r["label_3"] is not None]
    assert all(r["label_3"] == r["caption"] for r in labelled) and 0 < len(labelled) < len(rows)
    assert all(r["label_error"] == "ValueError: no" for r in rows if r["label_3"] is None)


def in_quarters(frames: Sequence[np.ndarray]) -> list[float]:
    """The colours in the middle of each quarter."""
    return colour_of(np.stack([frames[int((k + 0.5) * len(frames) / 4)] for k in range(4)]))
