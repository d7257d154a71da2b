"""The cascade in one process: what comes out, that it is the same each time, and that it can be stopped at every stage."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from serving.cascade import Result, Wish, generate
from serving.generate_request import GenerateRequest
from serving.local import LocalStages
from serving.plan import facts, plan
from serving.rewriting import Rewritten
from serving.settings import Settings
from tests.serving.exports import write_settings
from waver_core.video import decode, probe

PROMPT = "A medium-sized red disc moves to the left over a white background."


@dataclass
class Watcher:
    """Keeps what it is told; raises `Stop` at a stage where it is asked to."""

    stop_at: tuple[str, int] = ("", 0)
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    prompt: Rewritten | None = None

    async def step(self, stage: str, done: int, steps: int) -> None:
        self.steps.append((stage, done, steps))
        if (stage, done) == self.stop_at:
            raise StopHere

    async def rewritten(self, prompt: Rewritten) -> None:
        self.prompt = prompt

    async def preview(self, data: bytes) -> None:
        self.previews.append(data)


class StopHere(Exception):
    pass


class Served:
    """Settings and models of untrained exports."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.settings: Settings = write_settings(folder)
        self.facts = facts(self.settings)
        self.stages = LocalStages(self.settings)

    def make(self, watcher: Watcher | None = None, frames: dict[int, np.ndarray] | None = None, **asked: Any) -> Result:
        request = GenerateRequest(**{"prompt": PROMPT, "steps": 4, **asked})
        made = plan(request, self.facts, self.settings, asked.get("seed", 1))
        wish = Wish(request.prompt, made, request.rewrite, frames or {})
        return asyncio.run(generate(wish, self.stages, watcher or Watcher()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("cascade"))


def on_disk(result: Result, tmp_path: Path) -> str:
    path = tmp_path / "made.mp4"
    path.write_bytes(result.data)
    return str(path)


@pytest.fixture(autouse=True)
def told_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.streaming.EVERY_S", 0.0)


def test_a_refined_video_its_preview_and_its_steps(served: Served, tmp_path: Path) -> None:
    watcher = Watcher()
    result = served.make(watcher)
    info = probe(on_disk(result, tmp_path))
    assert (info.codec, info.width_px, info.height_px, info.fps, info.pixel_format) == ("h264", 96, 96, 4.0, "yuv420p")
    assert len(decode(on_disk(result, tmp_path))) == 9
    assert result.data.index(b"moov") < result.data.index(b"mdat")  # faststart
    (preview,) = watcher.previews
    (tmp_path / "preview.mp4").write_bytes(preview)
    assert decode(str(tmp_path / "preview.mp4")).shape == (9, 64, 64, 3)
    stages = list(dict.fromkeys(stage for stage, _, _ in watcher.steps))
    assert stages == ["rewrite", "encode", "base", "upscale", "refine", "decode"] == list(result.stage_seconds)
    assert [d for s, d, n in watcher.steps if s == "base" and n == 4] == [0, 1, 2, 3, 4, 4]
    assert max(d for s, d, _ in watcher.steps if s == "refine") == 2  # half the steps


def test_the_same_request_gives_the_same_bytes_and_another_seed_others(served: Served) -> None:
    first, again, other = served.make(seed=3), served.make(seed=3), served.make(seed=4)
    assert first.data == again.data != other.data


def test_the_file_says_that_it_is_generated_by_what_and_from_what(served: Served, tmp_path: Path) -> None:
    result = served.make(seed=3)
    with av.open(on_disk(result, tmp_path)) as container:
        told = dict(container.metadata)
    assert told["title"] == PROMPT and "Generated" in told["comment"]
    record = json.loads(told["description"])
    assert record["generated"] is True and record["digital_source_type"].endswith("trainedAlgorithmicMedia")
    assert record["seed"] == 3 and record["prompt"] == PROMPT
    assert record["checkpoint"] == served.facts.base and record["refiner_checkpoint"] == served.facts.refiner


def test_an_image_is_a_png(served: Served) -> None:
    result = served.make(kind="image")
    with Image.open(io.BytesIO(result.data)) as image:
        assert image.format == "PNG" and image.size == (96, 96) and "Generated" in image.info["Comment"]


@pytest.mark.parametrize("refine", [False, True], ids=["base", "refined"])
def test_a_given_first_frame_is_the_first_of_the_video(served: Served, tmp_path: Path, refine: bool) -> None:
    picture = np.zeros((200, 120, 3), np.uint8)  # another aspect ratio: cut to fit
    picture[:100] = (220, 40, 40)
    picture[100:] = (40, 40, 220)
    result = served.make(refine=refine, frames={0: picture})
    first = decode(on_disk(result, tmp_path))[0].astype(int)
    edge = 3 * len(first) // 8
    assert np.abs(first[:edge] - (220, 40, 40)).mean() < 12 and np.abs(first[-edge:] - (40, 40, 220)).mean() < 12


def test_the_last_frame_alone_and_both_change_the_video(served: Served) -> None:
    picture = np.full((64, 64, 3), 200, np.uint8)
    made = [served.make(refine=False, frames=f).data for f in ({}, {-1: picture}, {0: picture, -1: picture})]
    assert len(set(made)) == 3


@pytest.mark.parametrize("stage", ["rewrite", "encode", "base", "upscale", "refine", "decode"])
def test_an_observer_that_raises_ends_it_at_that_stage(served: Served, stage: str) -> None:
    before = served.stages.base_model.steps_done, served.stages.refiner_model.steps_done  # type: ignore[union-attr]
    watcher = Watcher(stop_at=(stage, 0))
    with pytest.raises(StopHere):
        served.make(watcher, steps=50)
    after = served.stages.base_model.steps_done, served.stages.refiner_model.steps_done  # type: ignore[union-attr]
    if stage == "base":
        assert after[0] - before[0] < 50
    if stage == "refine":
        assert after[1] - before[1] < 25
    assert watcher.steps[-1][0] == stage


def test_words_of_the_style_stand_before_the_prompt(served: Served) -> None:
    watcher = Watcher()
    made = plan(GenerateRequest(prompt=PROMPT, steps=2, refine=False), served.facts, served.settings, 1)
    wish = Wish(PROMPT, replace(made, style_words="Painting style"), rewrite=False)
    asyncio.run(generate(wish, served.stages, watcher))
    assert watcher.prompt is not None and watcher.prompt.prompt.startswith("Painting style") and watcher.prompt.original == PROMPT
