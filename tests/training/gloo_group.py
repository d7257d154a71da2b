"""Run as a file: workers of one stage over gloo, without Ray, forked from one process so that torch is imported once.

    python tests/training/gloo_group.py JOB WORLD [STOP_AFTER]

JOB: a pickled `training.job.Job` in hexadecimal. STOP_AFTER: a step after which every worker dies on the spot, as if its host
went away. Prints the workers' process ids in one line, and when all have ended their exit codes (-9 for SIGKILL) in another.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STOPPED = 9
"""Exit status of a worker that dies after STOP_AFTER."""


def main(job_hex: str, world: str, stop_after: str = "0") -> None:
    """Train, and print what became of the workers."""
    sys.path.insert(0, str(ROOT))
    import torch

    from training import loop  # noqa: F401 (before the fork: it takes seconds)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(job_hex, rank, int(world), int(stop_after), folder) for rank in range(int(world))]
        print(*children, flush=True)
        print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


def _fork(job_hex: str, rank: int, world: int, stop_after: int, folder: str) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _work(pickle.loads(bytes.fromhex(job_hex)), rank, world, stop_after, folder)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _work(job: Any, rank: int, world: int, stop_after: int, folder: str) -> None:
    import torch.distributed as dist

    from training.group import Worker
    from training.loop import train

    def report(news: dict[str, Any]) -> None:
        if stop_after and news.get("step") == stop_after:
            os._exit(STOPPED)

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    train(job, Worker(rank, world), report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
