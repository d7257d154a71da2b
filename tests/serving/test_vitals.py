"""A replica that cannot be trusted ends itself, and work that nobody waits for is given up."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving.deployments import AutoencoderDeployment, NetworkDeployment, TextDeployment
from serving.plan import checkpoints
from serving.settings import Deployment, Settings
from serving.vitals import Vitals
from tests.serving.exports import write_settings
from tests.serving.served import ROOT
from waver_core.shapes import VideoShape

ONE_THREAD = Deployment(threads=1)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Why this process would have ended itself."""
    reasons: list[str] = []
    monkeypatch.setattr("serving.vitals._end", reasons.append)
    yield reasons


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return write_settings(tmp_path)


def test_an_error_of_the_accelerator_ends_the_process_and_others_do_not(ended: list[str]) -> None:
    vitals = Vitals(60)
    for error in (torch.OutOfMemoryError("too large"), ValueError("wrong")):
        with pytest.raises(type(error)), vitals.working():
            raise error
    assert ended == []
    with pytest.raises(torch.AcceleratorError), vitals.working():
        raise torch.AcceleratorError("an illegal memory access was encountered")
    assert ended == ["AcceleratorError: an illegal memory access was encountered"]


def test_it_is_the_process_that_ends() -> None:
    script = "import torch; from serving.vitals import Vitals\nwith Vitals(1).working(): raise torch.AcceleratorError('spoiled')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=110)
    assert done.returncode == 1 and "this replica ends itself and is replaced: AcceleratorError: spoiled" in done.stderr
    assert "Traceback" not in done.stderr


def test_work_that_does_not_move_is_noticed_by_the_health_check(ended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now, vitals = 0.0, Vitals(10)
    monkeypatch.setattr("serving.vitals.time.monotonic", lambda: now)

    async def steps() -> AsyncGenerator[int, None]:
        for number in range(3):
            yield number

    async def main() -> None:
        nonlocal now
        async for _ in vitals.steps(steps()):
            now += 9  # slow, but it moves
            vitals.check()
        now += 60
        vitals.check()  # idle: nothing is late
        assert ended == []
        with vitals.working():
            now += 11
            vitals.check()

    asyncio.run(main())
    assert ended == ["no step in 10 s"]


async def _asked(name: str, settings: Settings, spoiled: Any, patch: pytest.MonkeyPatch) -> None:
    """Call the deployment that has this part, whose model raises."""
    base, _ = checkpoints(settings)
    if name in ("base", "refine"):
        network: Any = NetworkDeployment(name, base, settings.cascade, ONE_THREAD)  # type: ignore[arg-type]
        patch.setattr(network._denoiser, name, spoiled)
        _ = [item async for item in network.run(None)]
    elif name == "text":
        text = TextDeployment(base, ONE_THREAD)
        patch.setattr(text._texts, "encode", spoiled)
        await text.encode(["a disc"])
    else:
        pictures = AutoencoderDeployment(base, settings.cascade, ONE_THREAD)
        patch.setattr(pictures._pictures, name, spoiled)
        if name == "conditions":
            await pictures.conditions([VideoShape(1, 64, 64)], {0: np.zeros((64, 64, 3), np.uint8)})
        else:
            _ = [item async for item in getattr(pictures, name)(None)]


@pytest.mark.parametrize("name", ["base", "refine", "text", "conditions", "upscale", "decode"])
def test_every_deployment_with_a_model_ends_on_an_error_of_its_gpu(
    settings: Settings, ended: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def spoiled(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(name)

    with pytest.raises(torch.AcceleratorError):
        asyncio.run(_asked(name, settings, spoiled, monkeypatch))
    assert ended == [f"AcceleratorError: {name}"]


def test_weights_are_there_when_a_replica_is(settings: Settings, tmp_path: Path) -> None:
    """A missing one is found while the server starts, not by the first job."""
    base, _ = checkpoints(settings)
    made = AutoencoderDeployment(base, settings.cascade, ONE_THREAD)
    assert made._pictures.black(*base.recipe["video_sizes"][0]) is not None
    missing = {"backend": "wan_vae", "options": {"checkpoint": str(tmp_path / "none")}}
    without = {**base.recipe, "encoders": {**base.recipe["encoders"], "autoencoder": missing}}
    with pytest.raises(Exception, match="none"):
        AutoencoderDeployment(replace(base, recipe=without), settings.cascade, ONE_THREAD)
    words = {**base.recipe, "encoders": {**base.recipe["encoders"], "text": [{**missing, "backend": "t5"}]}}
    with pytest.raises(Exception, match="none"):
        TextDeployment(replace(base, recipe=words), ONE_THREAD)


@pytest.mark.ray
@pytest.mark.slow
def test_work_whose_caller_was_killed_is_given_up() -> None:
    script = Path(__file__).with_name("orphaned_work.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=110)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[-1].removeprefix("RESULT "))
    assert found["while it lived"] > 0 and found["stands still"] and found["made"] < found["asked for"]
