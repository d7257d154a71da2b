"""However a model is spread, every gradient is that of one process (fp32, 1e-5)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.recipe import Recipe

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
LIMIT = {"float32": 1e-5, "bfloat16": 0.1}
"""By what forward and backward compute in; in bf16 one value in 256 is lost at every operation."""
PLAIN = {
    "checkpointing": "none",
    "offload": "none",
    "compile": False,
    "windowed": False,
    "backend": "aot_eager",
    "dtype": "float32",
}
MESHES = {  # workers: replicas x shards x sequence -> shard, sequence
    2: {"1x2x1": (2, 1), "2x1x1": (1, 1), "1x1x2": (1, 2)},
    4: {"2x2x1": (2, 1), "1x2x2": (2, 2), "2x1x2": (1, 2), "1x1x4": (1, 4)},
}
MEMORY = {
    "selective": {"checkpointing": "selective"},
    "full": {"checkpointing": "full"},
    "offloaded": {"offload": "all"},
    "selective-offloaded": {"checkpointing": "selective", "offload": "all"},
}


def _cases(world: int) -> dict[str, dict[str, Any]]:
    """Every mesh with every kind of batch and windows; on the richest mesh, every way to save memory, compiled and not."""
    found: dict[str, dict[str, Any]] = {}
    for mesh, (shard, sequence) in MESHES[world].items():
        on_mesh = {**PLAIN, "shard": shard, "sequence": sequence}
        for batch in ("alone", "unpacked", "packed"):
            for windowed in (False, True):
                found[f"{mesh} {batch}{' windowed' * windowed}"] = {**on_mesh, "batch": batch, "windowed": windowed}
    shard, sequence = (2, 2) if world == 4 else (1, 2)
    rich = {**PLAIN, "shard": shard, "sequence": sequence, "batch": "packed", "windowed": True}
    for name, memory in MEMORY.items():
        found[f"rich {name}"] = {**rich, **memory}
    if world == 4:
        found["rich in bf16"] = {**rich, "dtype": "bfloat16", "checkpointing": "selective"}
        found["2x2x1 packed in bf16"] = {**PLAIN, "shard": 2, "sequence": 1, "batch": "packed", "dtype": "bfloat16"}
        found["rich compiled"] = {**rich, "compile": True}
        found["rich compiled selective-offloaded"] = {**rich, "compile": True, **MEMORY["selective-offloaded"]}
        found["2x2x1 unpacked compiled"] = {**PLAIN, "shard": 2, "sequence": 1, "batch": "unpacked", "compile": True}
    else:
        inductor = {"compile": True, "backend": "inductor", "windowed": False, "batch": "alone"}
        found["rich compiled by inductor"] = {**rich, **inductor, "checkpointing": "selective"}
    return found


@pytest.fixture(scope="module")
def results(encoding_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """By case the worst difference of each parameter over the workers; every world of workers runs once."""
    found: dict[str, dict[str, float]] = {}
    recipe = encoding_recipe("t2v_480p", "training.alignment={hidden: 8}")
    for world in MESHES:
        folder = tmp_path_factory.mktemp(f"world-{world}")
        cases = _cases(world)
        (folder / "cases.json").write_text(json.dumps(cases))
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        worker = str(Path(__file__).with_name("parity_worker.py"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        commands = [[sys.executable, worker, str(folder), str(rank), str(world)] for rank in range(world)]
        workers = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
        errors = [process.communicate(timeout=400)[1] for process in workers]
        assert [process.returncode for process in workers] == [0] * world, errors[0][-3000:]
        told = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world)]
        for case in cases:
            found[f"{world}: {case}"] = {name: max(of_one[case][name] for of_one in told) for name in told[0][case]}
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [f"{world}: {case}" for world in MESHES for case in _cases(world)])
def test_every_gradient_is_that_of_one_process(case: str, results: dict[str, dict[str, float]]) -> None:
    differences = results[case]
    assert len(differences) > 80
    world, _, name = case.partition(": ")
    limit = LIMIT[_cases(int(world))[name]["dtype"]]
    wrong = {name: f"{value:.1e}" for name, value in differences.items() if not value <= limit}
    assert not wrong, f"{case}: gradients differ, relative to one process, of {wrong}"
