"""The cost model against what can be worked out on paper for small meshes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.command_line import recipe_of
from training.parallel.cost import (
    EXCHANGED,
    GATHERED,
    OPTIMISER,
    SCATTERED,
    SUMMED,
    MicroBatch,
    Setting,
    mean_step,
    step_cost,
)
from training.parallel.hardware import Cluster, accelerator
from training.parallel.memory import MemoryPlan, block_bytes
from training.parallel.mesh import MeshPlan
from training.parallel.rates import ASSUMED, ELEMENTWISE_PASSES, rates_of
from training.parallel.state import Parameters, activation_budget, count_parameters, state_bytes
from training.recipe import Recipe
from waver_core.dit import DiTConfig, WaverDiT, preset
from waver_core.dit.flops import step_flops
from waver_core.errors import UserError
from waver_core.shapes import LatentShape

CONFIG = preset("tiny", text_dims=(32, 64))
BATCH = MicroBatch((LatentShape(3, 8, 8),) * 2, ((4, 4),) * 2)
TOKENS = 2 * (3 * 16 + 8)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipe_of("t2v_480p", None, ["embedded"], [])


@pytest.fixture(scope="module")
def parameters(recipe: Recipe) -> Parameters:
    return count_parameters(CONFIG, recipe, None)


def _memory(mode: str = "none", offloaded: bool = False) -> MemoryPlan:
    return MemoryPlan((mode,) * CONFIG.blocks, (offloaded,) * CONFIG.blocks, 0, 0)  # type: ignore[arg-type]


def _setting(parameters: Parameters, mesh: MeshPlan, device: str = "H100", memory: MemoryPlan | None = None) -> Setting:
    return Setting(
        config=CONFIG,
        parameters=parameters,
        mesh=mesh,
        cluster=Cluster(mesh.world, accelerator(device)),
        rates=rates_of(accelerator(device)),
        memory=memory or _memory(),
        micro_batches_per_step=4,
    )


def test_parameters_are_the_models(recipe: Recipe, parameters: Parameters) -> None:
    model = WaverDiT(CONFIG)
    assert parameters.total == sum(p.numel() for p in model.parameters())
    assert parameters.parts["dual blocks"] == sum(p.numel() for p in model.dual_blocks.parameters())
    assert parameters.largest_block == sum(p.numel() for p in model.dual_blocks[0].parameters())
    assert parameters.root == parameters.total - parameters.parts["dual blocks"] - parameters.parts["single blocks"]
    aligned = count_parameters(CONFIG, recipe, 12)
    assert set(aligned.parts) - set(parameters.parts) == {"alignment head"} and aligned.in_blocks == parameters.in_blocks


def test_shards_of_one_replica_add_up_to_the_model(parameters: Parameters) -> None:
    for mesh in (MeshPlan(1, 4, 1), MeshPlan(2, 2, 2), MeshPlan(3, 1, 4)):  # widths of tiny are multiples of four
        state = state_bytes(parameters, mesh)
        assert mesh.inner == 4 and 4 * state.weights == 4 * parameters.total == 4 * state.gradients == 2 * state.moments
        assert 4 * state.average == 4 * parameters.total
        assert state.gathered == 2 * 2 * parameters.largest_block and state.root == 2 * 2 * parameters.root
    alone = state_bytes(parameters, MeshPlan(1, 1, 1), itemsize=4)
    assert alone.total == 5 * 4 * parameters.total


def test_a_shard_is_what_torch_cuts(parameters: Parameters) -> None:
    for workers in (3, 5, 48):
        cut = sum(torch.empty(shape, device="meta").chunk(workers)[0].numel() for shape in parameters.shapes)
        assert parameters.sharded(workers) == cut >= parameters.total / workers


def test_the_budget_is_what_state_and_reserve_leave(parameters: Parameters) -> None:
    state = state_bytes(parameters, MeshPlan(1, 4, 1))
    assert activation_budget(10 * 2**30, state, on_gpu=False) == 10 * 2**30 - state.total
    assert activation_budget(10 * 2**30, state) == pytest.approx(10 * 2**30 * 0.96 - 2.5 * 2**30 - state.total, abs=1)


def test_what_two_by_two_workers_send(parameters: Parameters) -> None:
    """Two replicas of two shards; 4 micro-batches over 4 data workers."""
    sent = step_cost(_setting(parameters, MeshPlan(2, 2, 1)), BATCH).transfers
    # A worker lacks half of every weight: of all before the forward, of the blocks again before the backward, in bf16.
    assert sent[GATHERED].sent_bytes == 2 * (parameters.total / 2 + parameters.in_blocks / 2)
    # It gives away the half of its gradients that the other keeps, in fp32.
    assert sent[SCATTERED].sent_bytes == 4 * parameters.total / 2
    # Its half then meets the other replica's: halves of the half go out to be summed, and the sums come back.
    assert sent[SUMMED].sent_bytes == 2 * 4 * parameters.total / 2 / 2
    assert sent[EXCHANGED].sent_bytes == 0
    assert [each.group for each in sent.values()] == [2, 2, 2, 1]


@pytest.mark.parametrize(("mode", "times"), [("none", 2), ("selective", 2), ("full", 3)])
def test_what_a_sequence_group_sends(parameters: Parameters, mode: str, times: int) -> None:
    """Two workers with half of the tokens each: of q, k, v and the output the half that belongs to the other's heads, in every
    block, forward and backward and where all is computed again."""
    cost = step_cost(_setting(parameters, MeshPlan(1, 1, 2), memory=_memory(mode)), BATCH)
    one = 4 * (TOKENS // 2) * (CONFIG.width // 2) * 2
    assert cost.transfers[EXCHANGED].sent_bytes == 4 * times * CONFIG.blocks * one  # 4 micro-batches for one group
    assert cost.transfers[EXCHANGED].waited_s == cost.transfers[EXCHANGED].seconds > 0


def test_time_is_work_over_rate(parameters: Parameters) -> None:
    setting = _setting(parameters, MeshPlan(1, 2, 1))
    cost = step_cost(setting, BATCH)
    flops = step_flops(CONFIG, *BATCH)
    peak = accelerator("H100").bf16_tflops * 1e12
    terms = cost.terms
    assert setting.rounds == 2
    products = flops.linear + flops.modulation + flops.embedding
    assert terms["matrix products, forward"].seconds == pytest.approx(2 * products / (peak * ASSUMED["matmul"]))
    assert terms["attention, backward"].seconds == pytest.approx(2 * 2 * flops.attention / (peak * ASSUMED["attention_backward"]))
    moved = ELEMENTWISE_PASSES * TOKENS * CONFIG.width * 2 * CONFIG.blocks
    assert terms["elementwise, forward"].seconds == pytest.approx(2 * moved / (3.35e12 * ASSUMED["memory"]))
    assert sum(term.seconds for name, term in terms.items() if name.startswith("again:")) == terms["offload: wait"].seconds == 0
    assert cost.seconds == pytest.approx(sum(term.seconds for term in terms.values()))
    assert cost.mfu == pytest.approx(4 * flops.training / cost.seconds / (2 * peak))


def test_a_step_that_does_not_divide(parameters: Parameters) -> None:
    """Of 4 micro-batches 3 workers compute 2 each, and two of these are repeats that MFU does not count."""
    even, odd = (step_cost(_setting(parameters, MeshPlan(1, n, 1)), BATCH) for n in (2, 3))
    assert odd.step_flops == even.step_flops
    assert odd.terms["matrix products, forward"] == even.terms["matrix products, forward"]
    assert odd.mfu < even.mfu


def test_what_is_computed_again(parameters: Parameters) -> None:
    def seconds(mode: str, name: str) -> float:
        return step_cost(_setting(parameters, MeshPlan(1, 2, 1), memory=_memory(mode)), BATCH).terms[name].seconds

    for mode in ("selective", "full"):
        assert seconds(mode, "again: elementwise") == pytest.approx(seconds("none", "elementwise, forward"))
    assert seconds("selective", "again: products, attention") == 0
    blocks = 2 * step_flops(CONFIG, *BATCH).linear / (989e12 * ASSUMED["matmul"])
    assert seconds("full", "again: products, attention") == pytest.approx(blocks + seconds("none", "attention, forward"))


def test_what_is_kept_and_where(parameters: Parameters) -> None:
    for offloaded in (False, True):
        setting = _setting(parameters, MeshPlan(1, 1, 2), memory=_memory("selective", offloaded))
        cost = step_cost(setting, BATCH)
        local = (2 * 3 * 16 // 2, 2 * 8 // 2, 2)
        dual, single = (block_bytes(CONFIG, "dual", *local, sequence=2), block_bytes(CONFIG, "single", *local, sequence=2))
        whole = CONFIG.dual_blocks * dual.selective + CONFIG.single_blocks * single.selective
        assert (cost.device_bytes, cost.host_bytes) == ((0, whole) if offloaded else (whole, 0))
        assert (cost.terms["offload: wait"].seconds > 0) == offloaded  # so few tokens that no computation hides the copies


def test_what_nothing_hides_is_waited_for(parameters: Parameters) -> None:
    """With many tokens the first gather and the last scatter; with a few almost all that is sent."""
    setting = replace(_setting(parameters, MeshPlan(4, 8, 1)), micro_batches_per_step=32)
    few, many = (
        step_cost(setting, MicroBatch((LatentShape(3, 8, 8),) * samples, ((4, 4),) * samples)).transfers
        for samples in (1, 20_000)
    )
    assert (many[GATHERED].link, many[SUMMED].link) == ("node", "network")
    ring = setting.rates.ring(setting.cluster, 8)
    first, last = 2 * 7 / 8 * (parameters.root + parameters.largest_block), 4 * 7 / 8 * parameters.largest_block
    assert many[GATHERED].waited_s == pytest.approx(first / ring)
    assert many[SCATTERED].waited_s == pytest.approx(last / ring)
    assert 0 < many[SUMMED].waited_s < many[SUMMED].seconds
    for name in (GATHERED, SCATTERED, SUMMED):
        assert few[name].seconds == many[name].seconds
        assert 0.4 * few[name].seconds < few[name].waited_s <= few[name].seconds


def test_the_mean_counts_time(parameters: Parameters) -> None:
    setting = _setting(parameters, MeshPlan(1, 2, 1))
    small, large = step_cost(setting, BATCH), step_cost(setting, MicroBatch((LatentShape(3, 8, 8),) * 60, ((4, 4),) * 60))
    mean = mean_step([small, large], [3, 1])
    assert mean.seconds == pytest.approx((3 * small.seconds + large.seconds) / 4)
    assert mean.seconds == pytest.approx(sum(term.seconds for term in mean.terms.values()))
    assert mean.mfu == pytest.approx((3 * small.step_flops + large.step_flops) / 4 / mean.seconds / small.peak_flops)
    assert mean.tokens == 4 * (3 * small.batch.tokens + large.batch.tokens) / 4
    assert mean_step([small], [7]).terms[OPTIMISER].seconds == pytest.approx(small.terms[OPTIMISER].seconds)


def test_windows_make_the_refiner_faster(parameters: Parameters) -> None:
    setting = _setting(parameters, MeshPlan(1, 2, 1))
    windowed: DiTConfig = replace(CONFIG, windowed=True)
    full, refiner = (step_cost(s, BATCH) for s in (setting, replace(setting, config=windowed)))
    assert refiner.terms["attention, forward"].seconds < full.terms["attention, forward"].seconds
    assert refiner.terms["matrix products, forward"] == full.terms["matrix products, forward"]


def test_measured_rates_take_the_place_of_assumed_ones(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"versions": {}, "ceilings": {"matmul_tflops": 700, "attention_forward_tflops": None}}))
    rates = rates_of(accelerator("H200"), str(path))
    assert rates.matmul.value == 700e12 and rates.matmul.source == "measured: bench.json"
    assert rates.attention_forward == rates_of(accelerator("H200")).attention_forward


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "none of matmul_tflops"),
        ("{}", "none of matmul_tflops"),
        ('{"matmul_tflops": -1}', "matmul_tflops is no rate"),
        ('{"matmul_tflops": true}', "matmul_tflops is no rate"),
        ('{"matmul_tflops": 1700}', "more than a H100 can do"),
    ],
)
def test_measurements_that_cannot_be(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        rates_of(accelerator("H100"), str(path))
