"""What a dry run prints: tables that fit 100 columns, and the Markdown table of several clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from training.dry_run_plan import DryRun, ShapePlan
from training.parallel.cost import EXCHANGED, GATHERED, PER_STEP, SCATTERED, SUMMED, Term
from training.parallel.rates import Rates
from training.parallel.state import FRAGMENTED_SHARE, GATHERED_BLOCKS, RESERVED_BYTES
from waver_core.telemetry import duration_text

GIB = 2**30
_KEPT = {
    "none": "keep everything",
    "selective": "keep products and attention",
    "full": "keep their input only",
}
_WIDTH = 100
_DAYS = 4
"""From so many on, a time is told in days."""
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def print_plan(plan: DryRun, console: Console) -> None:
    """Everything about one cluster."""
    _heading(plan, console)
    for table in (_parameters(plan), _memory(plan), _shapes(plan), _transfers(plan), _rates(plan), _terms(plan)):
        console.print(table, width=min(_WIDTH, console.width))
        console.print()
    for line in (*_summary(plan), *plan.notes):
        console.print(line, width=min(_WIDTH, console.width))


def _heading(plan: DryRun, console: Console) -> None:
    setting, recipe, mesh = plan.setting, plan.recipe, plan.setting.mesh
    device = setting.cluster.accelerator
    nodes = -(-setting.cluster.workers // device.gpus_per_node)
    console.print(f"[bold]{recipe.stage} of {recipe.model.preset} on {setting.cluster}[/bold], a plan: nothing is trained")
    console.print(f"  cluster  {nodes:,} node{'s' * (nodes > 1)} of {min(device.gpus_per_node, setting.cluster.workers)}")
    console.print(f"  mesh     {mesh}; one copy of the weights on {mesh.inner:,}")
    console.print(
        f"  a step   {setting.micro_batches_per_step:,} micro-batches of up to {recipe.data.micro_batch_tokens:,} tokens over "
        f"{mesh.data_workers:,} data workers: {setting.rounds:,} each"
    )
    kept = ", ".join(f"{n} {told}" for mode, told in _KEPT.items() if (n := setting.memory.modes.count(mode)))
    offloaded = sum(setting.memory.offloaded)
    console.print(f"  blocks   {'compiled' if setting.compiled else 'not compiled'}, computed in {recipe.workers.dtype}")
    console.print(f"  memory   for backward {kept}{f'; {offloaded} wait on the host' if offloaded else ''}\n")


def _parameters(plan: DryRun) -> Table:
    parameters = plan.setting.parameters
    table = _table("Parameters", "part", "number", "share")
    for part, n in parameters.parts.items():
        table.add_row(part, f"{n:,}", f"{n / parameters.total:.1%}")
    table.add_section()
    table.add_row("all", f"{parameters.total:,}", "100.0%", style="bold")
    return table


def _memory(plan: DryRun) -> Table:
    setting, state, device = plan.setting, plan.memory.state, plan.setting.cluster.accelerator
    mesh = setting.mesh
    of = f"1/{mesh.inner:,} of it" if mesh.inner > 1 else "whole"
    kind = "bf16" if setting.itemsize == 2 else "fp32"
    lone = f"{kind} copies of autocast" if state.gathered else "none: a worker alone"
    rows: list[tuple[str, float, str]] = [
        ("weights", state.weights, f"fp32, {of}"),
        ("gradients", state.gradients, f"fp32, {of}"),
        ("Adam's moments", state.moments, f"two, fp32, {of}"),
        ("averaged weights", state.average, f"fp32, {of}"),
        (
            "gathered weights",
            state.gathered,
            f"{kind}, {GATHERED_BLOCKS} blocks: one computes, one arrives" if mesh.world > 1 else lone,
        ),
        ("outside of blocks", state.root, f"{kind}, weights and gradients, whole"),
        ("gradients under way", state.reducing, f"a block's in {kind}, and one in fp32 on its way to the shards"),
    ]
    if device.name != "cpu":
        rows.append(("reserved", RESERVED_BYTES, "CUDA context, workspaces of libraries, buffers of NCCL"))
        rows.append(("fragments", FRAGMENTED_SHARE * plan.memory_bytes, f"{FRAGMENTED_SHARE:.0%}, which no tensor fits"))
    planned = setting.memory
    rows.append(("activations", planned.device_bytes, "of the heaviest micro-batch, at most"))
    rows.append(("at work", plan.memory.working_bytes, "gradients of activations and buffers of the block that computes"))
    used = sum(n for _, n, _ in rows)
    table = _table(f"Memory of each {device.name}", "part", "GiB", "what")
    for name, n, what in rows:
        table.add_row(name, _gib(n), what)
    table.add_section()
    table.add_row("left", _gib(plan.memory_bytes - used), f"of {_gib(plan.memory_bytes)} GiB", style="bold")
    if planned.host_bytes:
        node = _gib(planned.host_bytes * min(device.gpus_per_node, setting.cluster.workers))
        table.add_row("on the host", _gib(planned.host_bytes), f"activations that wait for backward; {node} GiB of a node")
    return table


def _shapes(plan: DryRun) -> Table:
    columns = ("frames x px", "s", "of steps", "tokens", "x", "attention", "fwd+bwd s", "step s", "MFU", "kept GiB")
    table = _table("Micro-batches by shape", *columns)
    for row in plan.shapes:
        cost = row.cost
        waited_s = sum(cost.terms[name].seconds for name in PER_STEP)
        table.add_row(
            _name(row),
            f"{row.shape.frames / plan.recipe.fps:.1f}" if row.kind == "video" and plan.recipe.fps else "",
            f"{row.steps / sum(each.steps for each in plan.shapes):.0%}",
            f"{row.batch.tokens // len(row.batch.shapes):,}",
            f"{len(row.batch.shapes)}",
            f"{cost.flops.attention_share:.0%}",
            _seconds((cost.seconds - waited_s) / plan.setting.rounds),
            _seconds(cost.seconds),
            f"{cost.mfu:.2f}",
            _gib(cost.device_bytes),
        )
    return table


def _transfers(plan: DryRun) -> Table:
    table = _table(
        "Communication of each worker in a mean step", "what", "group", "over", "GB", "s", "hidden", "wait s", "in detail"
    )
    for name, each in plan.mean.transfers.items():
        if each.group == 1:
            table.add_row(name, "1", "-", "0", "0", "", "0", "no group of several")
            continue
        hidden = 1 - each.waited_s / each.seconds if each.seconds else 1.0
        table.add_row(
            name,
            f"{each.group:,}",
            each.link,
            _gb(each.sent_bytes),
            _seconds(each.seconds),
            f"{hidden:.0%}",
            _seconds(each.waited_s),
            _sent_what(name, plan),
        )
    return table


def _sent_what(name: str, plan: DryRun) -> str:
    kind = "bf16" if plan.setting.itemsize == 2 else "fp32"
    return {
        GATHERED: f"{kind}, two a micro-batch",
        SCATTERED: "fp32, one a micro-batch",
        SUMMED: "fp32, one a step",
        EXCHANGED: f"{kind}, q, k, v and output",
    }[name]


def _rates(plan: DryRun) -> Table:
    table = _table("Rates of one worker", "rate", "value", "where from")
    for field in fields(Rates):
        rate = getattr(plan.setting.rates, field.name)
        table.add_row(field.name.replace("_", " "), _scaled(rate.value, rate.unit), rate.source)
    return table


def _terms(plan: DryRun) -> Table:
    table = _table("Mean step, term by term", "term", "s", "share", "work of one worker", "at the rate of")
    for name, term in plan.mean.terms.items():
        table.add_row(
            name, _seconds(term.seconds), f"{term.seconds / plan.mean.seconds:.1%}", _scaled(term.work, term.unit), _rate_of(term)
        )
    table.add_section()
    table.add_row("step", _seconds(plan.mean.seconds), "100.0%", f"MFU {plan.mean.mfu:.2f}", "", style="bold")
    return table


def _summary(plan: DryRun) -> list[str]:
    mean, setting = plan.mean, plan.setting
    whole_s = plan.steps * mean.seconds
    long = duration_text(whole_s) if whole_s < _DAYS * 86_400 else f"{whole_s / 86_400:,.0f} days"
    lines = [
        f"[bold]{mean.seconds:,.2f} s a step, MFU {mean.mfu:.2f}[/bold], {mean.tokens / mean.seconds:,.0f} tokens a second; "
        f"{plan.steps:,.0f} steps, {long}, "
        f"{whole_s * setting.cluster.workers / 3600:,.{0 if whole_s > 36_000 else 1}f} {setting.cluster.accelerator.name} hours.",
        f"Samples: {plan.counted_from}.",
    ]
    idle = setting.rounds * setting.mesh.data_workers - setting.micro_batches_per_step
    if idle:
        lines.append(
            f"{idle} of {setting.mesh.data_workers} data workers have nothing of their own to do in the last round of a step."
        )
    return lines


def scale_table(plans: Sequence[DryRun]) -> str:
    """Memory, communication and speed of one stage on several clusters, a column each, in Markdown."""
    rows: list[tuple[str, list[str]]] = [
        (
            "replicas x shards x sequence",
            [f"{p.setting.mesh.replicate} x {p.setting.mesh.shard} x {p.setting.mesh.sequence}" for p in plans],
        ),
        ("inner shard", [f"{p.setting.mesh.inner:,}" for p in plans]),
        ("micro-batches a step", [f"{p.setting.micro_batches_per_step:,}" for p in plans]),
        ("**Memory of a GPU, GiB**", [""] * len(plans)),
        ("weights, fp32", [_gib(p.memory.state.weights) for p in plans]),
        ("gradients, fp32", [_gib(p.memory.state.gradients) for p in plans]),
        ("Adam's moments, fp32", [_gib(p.memory.state.moments) for p in plans]),
        ("averaged weights, fp32", [_gib(p.memory.state.average) for p in plans]),
        ("gathered: blocks, ends, gradients under way", [_gib(sum(p.memory.state[4:])) for p in plans]),
        ("activations, at most", [_gib(p.setting.memory.device_bytes) for p in plans]),
        ("blocks kept whole / selective / full", [_modes(p.setting.memory.modes) for p in plans]),
        ("blocks offloaded", [str(sum(p.setting.memory.offloaded)) for p in plans]),
        ("at work in a block's backward", [_gib(p.memory.working_bytes) for p in plans]),
        ("reserved and fragments", [_gib(RESERVED_BYTES + FRAGMENTED_SHARE * p.memory_bytes) for p in plans]),
        ("left", [_gib(p.memory.budget_bytes - p.setting.memory.device_bytes) for p in plans]),
        ("**Sent by a GPU in a step, GB**", [""] * len(plans)),
    ]
    for name in plans[0].mean.transfers:
        rows.append((name, [_sent(plan, name) for plan in plans]))
    means = [plan.mean for plan in plans]
    rows += [
        ("waited for, s", [_seconds(sum(t.waited_s for t in m.transfers.values())) for m in means]),
        ("**A step**", [""] * len(plans)),
        ("seconds", [f"{m.seconds:,.1f}" for m in means]),
        ("MFU", [f"{m.mfu:.2f}" for m in means]),
        ("tokens a second", [f"{m.tokens / m.seconds:,.0f}" for m in means]),
    ]
    head = "| " + " | ".join(["", *(str(plan.setting.cluster) for plan in plans)]) + " |"
    rule = "|---|" + "---:|" * len(plans)
    return "\n".join([head, rule, *("| " + " | ".join([name, *cells]) + " |" for name, cells in rows)])


def _sent(plan: DryRun, name: str) -> str:
    transfer = plan.mean.transfers[name]
    if transfer.group == 1:
        return "-"
    return f"{_gb(transfer.sent_bytes)} ({transfer.link})"


def _modes(modes: Sequence[str]) -> str:
    return " / ".join(str(modes.count(mode)) for mode in ("none", "selective", "full"))


def _rate_of(term: Term) -> str:
    if not term.work:
        return "nothing to do"
    return f"{term.rate}; what nothing hides" if term.rate in ("node", "network", "host") else term.rate.replace("_", " ")


def _name(row: ShapePlan) -> str:
    size = f"{row.shape.height_px}x{row.shape.width_px}"
    return f"{row.shape.frames} x {size}" if row.kind == "video" else f"{size} image"


def _gib(n: float) -> str:
    return f"{n / GIB:,.1f}" if abs(n) >= 10 * GIB else f"{n / GIB:.2f}" if abs(n) >= GIB / 10 else f"{n / GIB:.4f}"


def _gb(n: float) -> str:
    return f"{n / 1e9:,.1f}" if n >= 1e9 else f"{n / 1e9:.3f}"


def _seconds(seconds: float) -> str:
    if seconds == 0:
        return "0"
    return f"{seconds:,.1f}" if seconds >= 100 else f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.4f}"


def _scaled(value: float, unit: str) -> str:
    if not value:
        return ""
    for size, prefix in _PREFIXES:
        if value >= size:
            return f"{value / size:,.3g} {prefix}{unit}"
    return f"{value:,.3g} {unit}"


def _table(title: str, *columns: str) -> Table:
    """The first column is words, and so are long ones; the rest are numbers."""
    words = {"what", "where from", "at the rate of", "over", "in detail"}
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    table.show_edge, table.pad_edge = False, False
    for number, column in enumerate(columns):
        left = number == 0 or column in words
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=not left or number == 0)
    return table
