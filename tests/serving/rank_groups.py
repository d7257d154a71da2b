"""Run as a script by test_ranks.py: groups of gloo ranks in Ray actors, against one process. Prints one line of JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from waver_core.ray_environment import init_options, prepare_private_cluster

prepare_private_cluster()

import numpy as np
import ray
import torch

from serving.cascade import BaseWork, RefineWork
from serving.local import LocalStages
from serving.plan import checkpoints, facts, plan
from serving.ranks import GroupBroken, RankGroup
from serving.settings import Deployment
from serving.streaming import Done
from tests.serving.exports import write_export, write_settings
from tests.serving.generate_requests import PROMPT, request

GROUPS = {
    "cfg": Deployment(ranks=2, cpus=0.1, cfg_parallel=True, step_timeout_s=15, threads=1),
    "ulysses": Deployment(ranks=2, cpus=0.1, step_timeout_s=15, threads=1),
    "both": Deployment(ranks=4, cpus=0.1, cfg_parallel=True, step_timeout_s=15, threads=1),
}

VICTIMS = {"cfg": 1, "ulysses": 0, "both": 3}


async def works(stages: LocalStages, settings: Any) -> tuple[BaseWork, RefineWork]:
    """A video with a given first frame, and its refinement."""
    made = plan(request(steps=60, seed=3), facts(settings), settings, 3)
    text, negative = await stages.encode([PROMPT, "blurry"])
    (conditions,) = await stages.conditions([made.base_shape], {0: np.full((64, 64, 3), 200, np.uint8)})
    latents = np.random.default_rng(0).standard_normal((16, *made.shape.latent)).astype(np.float32)
    (larger,) = await stages.conditions([made.shape], {})
    return BaseWork(made, text, negative, conditions), RefineWork(made, text, latents, larger)


async def last_of(group: RankGroup, kind: Any, work: Any) -> np.ndarray:
    """The latents of a run."""
    items = [item async for item in group.run(kind, work)]
    assert isinstance(items[-1], Done)
    latents: np.ndarray = items[-1].value
    return latents


async def stopped_early(group: RankGroup, work: BaseWork) -> dict[str, Any]:
    """Close the stream in mid-run: steps stop, and the group goes on to the next sample as it is."""
    steps = group.run("base", work)
    seen = 0
    async for _ in steps:
        seen += 1
        if seen == 3:
            break
    await steps.aclose()
    then = await group.steps_done()
    await asyncio.sleep(0.3)
    return {"stands_still": await group.steps_done() == then, "built": group.built}


async def disturbed(group: RankGroup, work: BaseWork, number: int, how: str) -> dict[str, Any]:
    """Let a rank die or freeze in mid-run: an error within the time-out, then a group as good as new."""
    steps, seen, begun = group.run("base", work), 0, 0.0
    error = ""
    try:
        async for _ in steps:
            seen += 1
            if seen == 2:
                pid = await group._ranks[number].process_id.remote()
                begun = time.monotonic()
                os.kill(pid, signal.SIGSTOP if how == "freeze" else signal.SIGKILL)
    except GroupBroken as broken:
        error = str(broken)
    finally:
        await steps.aclose()
    if how == "freeze":
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return {"error": error, "seconds": time.monotonic() - begun}


async def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    settings = write_settings(folder)
    stages = LocalStages(settings)
    base, refiner = checkpoints(settings)
    assert refiner is not None
    work, sharpening = await works(stages, settings)
    alone = stages.base_model.base(work, lambda *_: True)
    sharpened = stages.refiner_model.refine(sharpening, lambda *_: True)  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    for name, options in GROUPS.items():
        group = RankGroup(base, settings.cascade, options)
        told = found[name] = {"difference": float(np.abs(await last_of(group, "base", work) - alone).max())}
        told["stopped"] = await stopped_early(group, work)
        told["killed"] = await disturbed(group, work, VICTIMS[name], "kill")
        told["afterwards"] = float(np.abs(await last_of(group, "base", work) - alone).max())
        if name == "ulysses":
            short = RankGroup(base, settings.cascade, options.model_copy(update={"step_timeout_s": 3.0}))
            await short.ready()
            told["frozen"] = await disturbed(short, work, 1, "freeze")
            told["thawed"] = float(np.abs(await last_of(short, "base", work) - alone).max())
            short.poison()
        group.poison()
    group = RankGroup(refiner, settings.cascade, GROUPS["ulysses"])
    found["refiner"] = float(np.abs(await last_of(group, "refine", sharpening) - sharpened).max())
    write_export(folder / "other", "t2v_192p_12fps")
    (folder / "other" / "model.safetensors.index.json").unlink()
    broken = RankGroup(replace(base, folder=str(folder / "other")), settings.cascade, GROUPS["cfg"])
    try:
        await broken.ready()
    except Exception as error:
        found["cannot_be_built"] = str(error)
    return found


if __name__ == "__main__":
    ray.init(num_cpus=4, **init_options())
    print("RESULT " + json.dumps(asyncio.run(main())))
    ray.shutdown()
