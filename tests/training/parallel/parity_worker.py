"""One of several workers that compute gradients together, and compare them with those of one process. Run by test_parity.py."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from training.conditioning import Example
from training.export import Facts, in_order, record_of, write_export
from training.group import Worker
from training.parallel import apply
from training.parallel.compiling import compile_block
from training.parallel.fsdp import reduce_over_replicas
from training.parallel.mesh import plan_mesh
from training.parallel.offload import Offload
from training.recipe import Recipe, recipe_from_yaml
from training.trainee import Trainee
from waver_core.dit import DiTConfig
from waver_core.tensor_files import Entry
from waver_core.weights import load_into

CONFIG = DiTConfig(1, 3, 4, 8, text_dims=(6, 10), max_grid=(4, 8, 8), full_blocks=1)
BATCHES = {  # latent shapes of the samples of two micro-batches; odd numbers of tokens, and of rows
    "alone": [[(3, 6, 10)], [(3, 6, 10)]],
    "unpacked": [[(2, 6, 6), (2, 6, 6)], [(2, 6, 6), (2, 6, 6)]],
    "packed": [[(3, 6, 10), (1, 6, 6), (2, 5, 4)], [(1, 4, 4), (3, 4, 6)]],
}


def examples(shapes: list[tuple[int, int, int]], seed: int, *, alike: bool) -> list[Example]:
    """Samples of random numbers, the same on every worker; with `alike` their texts are equally long."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for i, shape in enumerate(shapes):
        texts = tuple(torch.randn(2 + (0 if alike else i) + e, dim, generator=g) for e, dim in enumerate(CONFIG.text_dims))
        features = torch.randn(1, 2, 2, 5, generator=g)
        parts = torch.randn(36, *shape, generator=g), torch.randn(16, *shape, generator=g), torch.rand((), generator=g)
        found.append(Example(*parts, texts, features, "video" if shape[0] > 1 else "image", "t2v"))
    return found


def reference(config: DiTConfig, recipe: Recipe, batches: list[list[Example]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights, and the gradients of the mean loss of all samples in one process."""
    torch.manual_seed(3)
    trainee = Trainee(config, recipe, 5)
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # modulations start at zero, and would hide most of the model
    samples = sum(map(len, batches))
    for batch in batches:
        (trainee(batch).total.sum() / samples).backward()
    weights = {name: p.detach().clone() for name, p in trainee.named_parameters()}
    return weights, {name: p.grad for name, p in trainee.named_parameters()}


def differences(case: dict[str, Any], recipe: Recipe, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Relative difference of every parameter's gradient to that of one process."""
    config = DiTConfig(**{**CONFIG.to_dict(), "windowed": case["windowed"]})
    batches = [examples(shapes, 10 + i, alike=case["batch"] != "packed") for i, shapes in enumerate(BATCHES[case["batch"]])]
    weights, wanted = reference(config, recipe, batches)
    if rank == 0:
        entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in weights.items()}
        record = record_of(recipe, Facts(config.to_dict(), {}))
        write_export(str(folder), entries, in_order(weights, entries, 10**9), record, replace=True)
    dist.barrier()
    settings = {key: case[key] for key in ("shard", "sequence", "checkpointing", "offload", "compile")}
    workers = recipe.workers.model_copy(update={"dtype": case["dtype"]})
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=settings), "workers": workers})
    plan = plan_mesh(world, config.heads, case["shard"], case["sequence"])
    worker = Worker(rank, world, "cpu", plan.sequence)
    with torch.device("meta"):
        trainee = Trainee(config, recipe, 5)
    spread = apply.parallelise(trainee, recipe, plan, "cpu")
    load_into(trainee, str(folder))  # each worker reads its part of the weights of one process
    own = batches[worker.data_rank :: worker.data_workers] or batches[:1]
    idle = worker.data_rank >= len(batches)
    for number, batch in enumerate(own):
        reduce_over_replicas(trainee, number == len(own) - 1)
        weight = 0.0 if idle else worker.data_workers / sum(map(len, batches))
        (trainee(batch).total.sum() * weight).backward()
    assert (spread.offload is not None and spread.offload.moved_bytes > 0) == (case["offload"] == "all")
    found = {}
    for name, parameter in trainee.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, f"{name} has no gradient in fp32"
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        found[name] = float((grad - wanted[name]).norm() / wanted[name].norm())
    return found


def main() -> None:
    """folder rank world: cases.json and recipe.yaml in, result-<rank>.json out."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    recipe = recipe_from_yaml((folder / "recipe.yaml").read_text(), "recipe.yaml")
    found = {}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        apply.compile_block = partial(compile_block, backend=case["backend"])
        apply.Offload = partial(Offload, min_bytes=64)  # what is small here stays on the device otherwise
        torch.compiler.reset()
        found[name] = differences(case, recipe, folder / "weights", rank, world)
    (folder / f"result-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
