"""What `test_vitals.py` runs: an actor asks another for a long piece of work, and is killed."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from waver_core.ray_environment import init_options, prepare_private_cluster

prepare_private_cluster()

import ray

from serving.vitals import Owner, Vitals, this_actor

STEPS = 3000


class Worker:
    """Counts to `STEPS` in half a minute."""

    def __init__(self) -> None:
        self.made, self._vitals = 0, Vitals(60)

    async def run(self, owner: Owner) -> AsyncGenerator[int, None]:
        """A step every ten milliseconds."""
        async for number in self._vitals.steps(self._steps(), owner):
            yield number

    async def _steps(self) -> AsyncGenerator[int, None]:
        for number in range(STEPS):
            await asyncio.sleep(0.01)
            self.made += 1
            yield number

    async def count(self) -> int:
        """Steps so far."""
        return self.made


class Caller:
    """Asks for the work and waits for it."""

    async def ask(self, worker: Any) -> None:
        """Returns when all is done."""
        async for _ in worker.run.options(num_returns="streaming").remote(this_actor()):
            pass


def main() -> dict[str, Any]:
    """What came of it."""
    worker = ray.remote(Worker).options(num_cpus=0).remote()
    owner = ray.remote(Caller).options(num_cpus=0).remote()
    owner.ask.remote(worker)
    while ray.get(worker.count.remote()) < 150:  # longer than the owner is trusted unasked
        time.sleep(0.05)
    lived = ray.get(worker.count.remote())
    ray.kill(owner)
    give_up, before, now = time.monotonic() + 20, -1, lived
    while now != before and time.monotonic() < give_up:
        time.sleep(1.0)
        before, now = now, ray.get(worker.count.remote())
    return {"while it lived": lived, "stands still": now == before, "made": now, "asked for": STEPS}


if __name__ == "__main__":
    ray.init(num_cpus=2, **init_options())
    print("RESULT " + json.dumps(main()))
    ray.shutdown()
