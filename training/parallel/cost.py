"""How long a step takes and what it sends, predicted: every term is work divided by a rate, and both can be printed.

    step = rounds x (compute + computed again + Ulysses + what of FSDP and offload is waited for) + optimiser

A round is one micro-batch of every data worker. FSDP's gathers and scatters run beside the computation; what they take longer is
waited for, and so are the first block's weights and the last block's gradients, which nothing hides. Ulysses stands in the way of
every block and is paid in full. Not modelled: launches of kernels, slow workers, links shared by two transfers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from training.parallel.hardware import Cluster
from training.parallel.memory import MemoryPlan, block_bytes
from training.parallel.mesh import MeshPlan
from training.parallel.rates import (
    ELEMENTWISE_BACKWARD,
    ELEMENTWISE_PASSES,
    ELEMENTWISE_PASSES_EAGER,
    OPTIMIZER_PASSES,
    Rates,
)
from training.parallel.state import FP32, Parameters
from waver_core.dit import DiTConfig
from waver_core.dit.flops import Flops, TextLength, attention_by_block, step_flops
from waver_core.dit.layout import WINDOWS
from waver_core.shapes import LatentShape

_EXCHANGES = 4
"""Tensors [n, D] that Ulysses exchanges in a block: queries, keys, values; then what was attended."""

GATHERED, SCATTERED, SUMMED, EXCHANGED = "weights gathered", "gradients scattered", "replicas' gradients", "Ulysses"
"""What is sent: by FSDP over the inner shard, by it over the replicas, and by sequence groups."""
OPTIMISER = "optimiser and average"
PER_STEP = (f"{SUMMED}: wait", OPTIMISER)
"""Terms that a step has once, whatever the number of its micro-batches."""


@dataclass(frozen=True)
class Setting:
    """All that a step depends on but its samples."""

    config: DiTConfig
    parameters: Parameters
    mesh: MeshPlan
    cluster: Cluster
    rates: Rates
    memory: MemoryPlan
    """What each block keeps for its backward: one plan for the whole stage, made for its heaviest micro-batch"""
    micro_batches_per_step: int
    itemsize: int = 2
    compiled: bool = True

    @property
    def rounds(self) -> int:
        """Micro-batches that every data worker computes in a step; some of the last round may be repeats that do not count."""
        return -(-self.micro_batches_per_step // self.mesh.data_workers)


class MicroBatch(NamedTuple):
    """Samples of one forward, on all workers of a sequence group."""

    shapes: tuple[LatentShape, ...]
    texts: tuple[TextLength, ...]

    @property
    def video_tokens(self) -> int:
        """Of all samples."""
        return sum(shape.tokens for shape in self.shapes)

    @property
    def text_tokens(self) -> int:
        """Of all samples."""
        return sum(text if isinstance(text, int) else sum(text) for text in self.texts)

    @property
    def tokens(self) -> int:
        """Of video and text."""
        return self.video_tokens + self.text_tokens


class Term(NamedTuple):
    """A part of a step's time: work at a rate, or a remainder that is said in words."""

    seconds: float
    work: float = 0.0
    unit: str = ""
    """"FLOP" or "B" of `work`, on one worker"""
    rate: str = ""
    """Field of `Rates` that it is divided by, or the words"""


class Transfer(NamedTuple):
    """What one worker exchanges in a step for one purpose."""

    sent_bytes: float
    group: int
    link: str
    """"node", "network", or "none" for a group of one"""
    seconds: float
    waited_s: float
    """Of these seconds, those that no computation hides"""


@dataclass(frozen=True)
class StepCost:
    """A step whose micro-batches are all like one."""

    batch: MicroBatch
    flops: Flops
    """Of one micro-batch"""
    device_bytes: int
    """Kept for backward in one worker's device memory"""
    host_bytes: int
    """and in its host memory"""
    terms: dict[str, Term]
    """Of the whole step, by name; their seconds add up to it"""
    transfers: dict[str, Transfer]
    """Of the whole step"""
    micro_batches: int
    peak_flops: float
    """Of all workers, a second"""

    @property
    def seconds(self) -> float:
        """The step."""
        return sum(term.seconds for term in self.terms.values())

    @property
    def step_flops(self) -> int:
        """The model's operations, forward and backward, of all micro-batches that count."""
        return self.micro_batches * self.flops.training

    @property
    def mfu(self) -> float:
        """Model operations over what the accelerators could do in the time."""
        return self.step_flops / (self.seconds * self.peak_flops)


def step_cost(setting: Setting, batch: MicroBatch) -> StepCost:
    """Predict a step of such micro-batches."""
    config, mesh, rates, rounds, modes = setting.config, setting.mesh, setting.rates, setting.rounds, setting.memory.modes
    flops = step_flops(config, batch.shapes, batch.texts)
    blocks, parts = config.blocks, mesh.sequence
    tokens = -(-batch.tokens // parts)
    products = (flops.forward - flops.attention) / parts
    attention = [n / parts for n in attention_by_block(config, batch.shapes, batch.texts)]
    passes = ELEMENTWISE_PASSES if setting.compiled else ELEMENTWISE_PASSES_EAGER
    elementwise = passes * tokens * config.width * setting.itemsize  # bytes of a block's forward

    block_product_s = flops.linear / parts / blocks / rates.matmul.value
    attention_s = [n / rates.attention_forward.value for n in attention]
    device_bytes, host_bytes = kept_bytes(setting, batch)
    again = [block for block, mode in enumerate(modes) if mode == "full"]
    again_flops = len(again) * flops.linear / parts / blocks + sum(attention[b] for b in again)
    again_bytes = (blocks - modes.count("none")) * elementwise
    again_s = len(again) * block_product_s + sum(attention_s[b] for b in again)

    terms = {
        "matrix products, forward": _work(products, "FLOP", "matmul", rates),
        "matrix products, backward": _work(2 * products, "FLOP", "matmul", rates),
        "attention, forward": _work(sum(attention), "FLOP", "attention_forward", rates),
        "attention, backward": _work(2 * sum(attention), "FLOP", "attention_backward", rates),
        "elementwise, forward": _work(blocks * elementwise, "B", "memory", rates),
        "elementwise, backward": _work(ELEMENTWISE_BACKWARD * blocks * elementwise, "B", "memory", rates),
        "again: products, attention": Term(again_s, again_flops, "FLOP", "as in forward"),
        "again: elementwise": _work(again_bytes, "B", "memory", rates),
    }
    forward_s = sum(term.seconds for name, term in terms.items() if name.endswith("forward"))
    backward_s = sum(term.seconds for term in terms.values()) - forward_s
    copied_s = host_bytes / rates.host.value
    late_s = max(0.0, copied_s - forward_s) + max(0.0, copied_s - backward_s)
    terms["offload: wait"] = Term(late_s, 2.0 * host_bytes, "B", "host")
    terms = {name: _times(term, rounds) for name, term in terms.items()}

    exchanges = 2 * blocks + len(again)  # selective checkpointing keeps what was exchanged
    transfers = _sharding_transfers(setting, forward_s, backward_s)
    transfers[EXCHANGED] = _ulysses(setting, tokens, rounds * exchanges)
    for name, transfer in transfers.items():
        terms[f"{name}: wait"] = Term(transfer.waited_s, transfer.sent_bytes, "B", transfer.link)
    terms[OPTIMISER] = _work(OPTIMIZER_PASSES * FP32 * setting.parameters.sharded(mesh.inner), "B", "memory", rates)
    peak = setting.cluster.workers * setting.cluster.accelerator.bf16_tflops * 1e12
    return StepCost(batch, flops, device_bytes, host_bytes, terms, transfers, setting.micro_batches_per_step, peak)


def kept_bytes(setting: Setting, batch: MicroBatch) -> tuple[int, int]:
    """Activations of a micro-batch that a worker keeps for backward, on its device and in host memory."""
    parts, config = setting.mesh.sequence, setting.config
    local = (-(-batch.video_tokens // parts), -(-batch.text_tokens // parts), len(batch.shapes), setting.itemsize)
    held, plan = [0, 0], setting.memory
    fits = local[0] + local[1] <= plan.offload_above
    for number, (mode, offloaded) in enumerate(zip(plan.modes, plan.offloaded, strict=True)):
        windows = prod(WINDOWS.get(config.attention_kind(number), (1,)))
        kind: Literal["dual", "single"] = "dual" if number < config.dual_blocks else "single"
        held[offloaded and not fits] += getattr(block_bytes(config, kind, *local, windows=windows, sequence=parts), mode)
    return held[0], held[1]


def _work(work: float, unit: str, rate: str, rates: Rates) -> Term:
    return Term(work / getattr(rates, rate).value, work, unit, rate)


def _times(term: Term, rounds: float) -> Term:
    return term._replace(seconds=rounds * term.seconds, work=rounds * term.work)


def _sharding_transfers(setting: Setting, forward_s: float, backward_s: float) -> dict[str, Transfer]:
    """FSDP's, of a whole step. Weights outside of blocks are gathered once a micro-batch, those of blocks for the forward and
    again for the backward; replicas add up their gradients in the last micro-batch's backward."""
    mesh, parameters, rounds = setting.mesh, setting.parameters, setting.rounds
    nothing = Transfer(0, 1, "none", 0, 0)
    gather = scatter = nothing
    inner, replicas = mesh.inner, mesh.replicate
    late_s = 0.0
    if inner > 1:
        rate, link = setting.rates.ring(setting.cluster, inner), setting.cluster.link(inner)
        kept = (inner - 1) / inner
        forward, backward = (setting.itemsize * kept * n for n in (parameters.total, parameters.in_blocks))
        reduced = FP32 * kept * parameters.total
        first_s = setting.itemsize * kept * (parameters.root + parameters.largest_block) / rate
        last_s = FP32 * kept * parameters.largest_block / rate
        gather_s, backward_gather_s, scatter_s = forward / rate, backward / rate, reduced / rate
        late_s = backward_gather_s + scatter_s - last_s - backward_s  # negative: time to spare
        late_gather_s = min(max(0.0, late_s), max(0.0, backward_gather_s - backward_s))
        waited_s = first_s + max(0.0, gather_s - first_s - forward_s) + late_gather_s
        gather = Transfer(rounds * (forward + backward), inner, link, rounds * (gather_s + backward_gather_s), rounds * waited_s)
        waited_s = last_s + max(0.0, late_s) - late_gather_s
        scatter = Transfer(rounds * reduced, inner, link, rounds * scatter_s, rounds * waited_s)
    summed = nothing
    if replicas > 1:
        rate = setting.rates.ring(setting.cluster, replicas, stride=inner)
        sent = 2 * (replicas - 1) / replicas * FP32 * parameters.sharded(inner)
        late_s = late_s if inner > 1 else -backward_s
        tail_s = sent / rate * parameters.largest_block / parameters.total  # the last block's, which nothing hides
        waited_s = tail_s + max(0.0, sent / rate - tail_s + min(0.0, late_s))
        summed = Transfer(sent, replicas, setting.cluster.link(replicas, stride=inner), sent / rate, waited_s)
    return {GATHERED: gather, SCATTERED: scatter, SUMMED: summed}


def _ulysses(setting: Setting, tokens: int, exchanges: int) -> Transfer:
    """`exchanges` times what a block's forward sends: for the forward, for the gradients, and where it is computed again."""
    parts = setting.mesh.sequence
    if parts == 1:
        return Transfer(0, 1, "none", 0, 0)
    payload = exchanges * _EXCHANGES * tokens * setting.config.width * setting.itemsize
    seconds = setting.rates.all_to_all_s(setting.cluster, payload, parts)
    return Transfer(payload * (parts - 1) / parts, parts, setting.cluster.link(parts), seconds, seconds)


class MeanStep(NamedTuple):
    """A stage's step in the mean over its steps."""

    terms: dict[str, Term]
    transfers: dict[str, Transfer]
    seconds: float
    mfu: float
    tokens: float
    """Of all micro-batches of a step"""


def mean_step(costs: Sequence[StepCost], weights: Sequence[float]) -> MeanStep:
    """Mean of steps of several kinds that occur so often; MFU is that of their whole time."""
    shares = [weight / sum(weights) for weight in weights]
    weighted = list(zip(costs, shares, strict=True))
    first = costs[0]
    terms = {
        name: term._replace(
            seconds=sum(w * c.terms[name].seconds for c, w in weighted), work=sum(w * c.terms[name].work for c, w in weighted)
        )
        for name, term in first.terms.items()
    }
    transfers = {
        name: transfer._replace(
            sent_bytes=sum(w * c.transfers[name].sent_bytes for c, w in weighted),
            seconds=sum(w * c.transfers[name].seconds for c, w in weighted),
            waited_s=sum(w * c.transfers[name].waited_s for c, w in weighted),
        )
        for name, transfer in first.transfers.items()
    }
    seconds = sum(w * c.seconds for c, w in weighted)
    operations = sum(w * c.step_flops for c, w in weighted)
    tokens = sum(w * c.micro_batches * c.batch.tokens for c, w in weighted)
    return MeanStep(terms, transfers, seconds, operations / (seconds * first.peak_flops), tokens)
