"""Entry script: measure what a micro-batch costs on this machine, so that packs are bucketed and dealt by it (Waver §5).

python training/calibrate.py --stage t2v_480p --profile full --blocks 8
python training/calibrate.py --stage t2v_480p --tokens 1024

Times forward and backward of packs with few long samples, many short ones, and little at all; fits the time by a fixed part, one
per token and one per pair of tokens that see each other; and prints the setting for pipelines.yaml or --set. Weights are random.
The alignment head, which sees a sixteenth of the tokens in one stage, is left out. One worker is measured, with the recipe's
compilation, checkpointing and offload; `auto` would plan for the part that is built here, so say what the run will do. Weights
gathered from other workers take the same time for all packs, and a sequence group divides tokens and pairs alike.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from training.command_line import Profiles, Stage, recipe_of
from training.conditioning import Example
from training.data.cost import Fit, Measured, MicroBatchCost, counted_cost, fit_cost, video_pairs
from training.job import text_dims
from training.parallel.apply import parallelise
from training.parallel.mesh import MeshPlan
from training.recipe import Recipe
from training.trainee import Trainee, model_config
from waver_core.command_line import ConfigPath, Sets, new_console
from waver_core.command_line import run as run_command_line
from waver_core.dit import DiTConfig
from waver_core.errors import UserError
from waver_core.shapes import LATENT_CHANNELS, PATCH, LatentShape

LONGEST_TEXT = 256
DOUBTFUL = 0.1
"""Mean error of a fit above which it is worth another try."""
_SHORTEST = 24
"""Tokens of a sample at least."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Pack(NamedTuple):
    """A micro-batch to time."""

    name: str
    shapes: tuple[LatentShape, ...]
    texts: tuple[int, ...]
    """Text tokens of each sample"""

    @property
    def tokens(self) -> int:
        """With text."""
        return sum(self.texts) + sum(shape.tokens for shape in self.shapes)

    def pairs(self, config: DiTConfig) -> int:
        """Pairs of tokens that see each other, on the mean over the blocks."""
        both = zip(self.shapes, self.texts, strict=True)
        return sum(text * (text + 2 * shape.tokens) + video_pairs(shape.grid, config) for shape, text in both)


@app.command()
def main(
    stage: Stage,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=8 * _SHORTEST, help="Of the fullest pack (default: data.micro_batch_tokens).")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="Build so many blocks, where all do not fit, and scale their time up.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each pack; their median counts.")] = 3,
    config: ConfigPath = None,
    profile: Profiles = None,
    set_: Sets = None,
) -> None:
    """Time packs under a stage's recipe, fit their cost, and print it as a setting."""
    recipe = recipe_of(stage, config, profile, set_)
    console = new_console()
    fullest = tokens or recipe.data.micro_batch_tokens
    model = calibrated_model(recipe)
    part = model if blocks is None else reduced(model, blocks)
    device = device_of(recipe)
    console.print(
        f"{recipe.model.preset} on {_device_name(device)}, {recipe.workers.dtype}: packs of up to {fullest:,} tokens"
        + (f"; {part.blocks} of {model.blocks} blocks, scaled up" if part is not model else "")
    )
    packs = packs_up_to(fullest, recipe.data.max_per_pack, part)
    with console.status("Timing") as status:
        measured = measure(recipe, model, part, packs, device, repeats, lambda name: status.update(f"Timing {name}"))
    fit = fit_cost(measured)
    table = Table(title="Forward and backward", title_justify="left", header_style="bold")
    for name in ("pack", "tokens", "pairs", "measured ms", "fitted ms", "error"):
        table.add_column(name, justify="left" if name == "pack" else "right")
    for pack, one, error in zip(packs, measured, fit.errors, strict=True):
        times = (f"{1e3 * seconds:,.1f}" for seconds in (one.seconds, one.seconds * (1 + error)))
        table.add_row(pack.name, f"{one.tokens:,}", f"{one.pairs:,}", *times, f"{error:+.1%}")
    console.print(table)
    console.print(f"Fit error: {fit.mean_error:.1%} in the mean, {fit.worst_error:.1%} at most. {_equal(fit, model)}")
    if fit.mean_error > DOUBTFUL:
        console.print(
            "That is much: the machine has other work, or the packs are too small for it. Measure again, or raise --tokens."
        )
    console.print(f"--set '{setting(fit.cost)}'", soft_wrap=True, markup=False)


def measure(
    recipe: Recipe,
    model: DiTConfig,
    part: DiTConfig,
    packs: Sequence[Pack],
    device: str,
    repeats: int,
    tell: Callable[[str], Any] = lambda name: None,
) -> list[Measured]:
    """Time of every pack on the whole model, built with the blocks of `part` only.

    Raises `UserError` where it does not fit the device.
    """
    try:
        trainee = build(recipe, part, device)
        seconds = _timed(trainee, packs, device, repeats, tell)
        if part is not model:
            _bridge(trainee)
            rest = _timed(trainee, packs, device, repeats, tell)
            times = model.blocks / part.blocks
            seconds = [b + max(0.0, a - b) * times for a, b in zip(seconds, rest, strict=True)]
    except torch.cuda.OutOfMemoryError as error:
        room = torch.cuda.get_device_properties(0).total_memory / 2**30
        raise UserError(f"packs of that size do not fit {room:.0f} GiB: give fewer --blocks or --tokens") from error
    return [Measured(p.tokens, p.pairs(part), s) for p, s in zip(packs, seconds, strict=True)]


def build(recipe: Recipe, config: DiTConfig, device: str) -> Trainee:
    """What the loop trains, made as it makes it for one worker: with the recipe's checkpointing, offload and compilation."""
    if recipe.workers.threads and device == "cpu":
        torch.set_num_threads(recipe.workers.threads)
    with torch.device("meta"):
        trainee = Trainee(config, recipe.model_copy(update={"align": False}), None)
    parallelise(trainee, recipe, MeshPlan(replicate=1, shard=1, sequence=1), device)
    # Weights that start at zero would make the backward one of zeros, which draws less power and so runs faster.
    with torch.no_grad():
        for weight in trainee.parameters():
            if not weight.any():
                weight.normal_(std=0.02)
    return trainee.train()


def packs_up_to(tokens: int, max_per_pack: int, config: DiTConfig) -> list[Pack]:
    """Full packs of one, two, four, ... samples, two mixed ones, and three with little in them, which tell the fixed part."""
    halves = range(min(6, (tokens // _SHORTEST).bit_length() - 1, max_per_pack.bit_length() - 1) + 1)
    lengths = [[tokens >> k] * (1 << k) for k in halves]
    if max_per_pack >= 5 and tokens >= 8 * _SHORTEST:
        lengths += [[tokens // 2, *[tokens // 8] * 4], [tokens // 4, tokens // 4, tokens // 4, tokens // 8, tokens // 8]]
    lengths += [[tokens // 2], [tokens // 4], [tokens // 8]]
    return [_pack(each, config) for each in lengths]


def _pack(lengths: Sequence[int], config: DiTConfig) -> Pack:
    """Samples of about these lengths; texts differ, so that no pack is of one length, as real ones are not."""
    encoders = len(config.text_dims)
    texts = [max(encoders, min(LONGEST_TEXT, n // 8) - i % 4) for i, n in enumerate(lengths)]
    shapes = [_shape_near(max(1, n - text), config.max_grid) for n, text in zip(lengths, texts, strict=True)]
    counted = [f"{lengths.count(n)} x {n:,}" for n in dict.fromkeys(lengths)]
    return Pack(" + ".join(counted), tuple(shapes), tuple(texts))


def _shape_near(tokens: int, max_grid: tuple[int, int, int]) -> LatentShape:
    """A video of about so many tokens, twice as high and wide as it is long, within the model's position tables."""
    frames = min(max_grid[0], max(1, round((tokens / 4) ** (1 / 3))))
    rows = min(max_grid[1], max(1, round((tokens / frames) ** 0.5)))
    columns = min(max_grid[2], max(1, round(tokens / frames / rows)))
    return LatentShape(frames, PATCH * rows, PATCH * columns)


def calibrated_model(recipe: Recipe) -> DiTConfig:
    """The recipe's network. Widths of texts that the recipe overrides need no text encoder to be there."""
    given = recipe.model.overrides.get("text_dims")
    return model_config(recipe, given or text_dims(recipe))


def reduced(config: DiTConfig, blocks: int) -> DiTConfig:
    """The same network with about so many blocks, of both kinds and with windows in the same proportion."""
    if blocks >= config.blocks:
        return config

    def some(count: int) -> int:
        return max(1, round(count * blocks / config.blocks)) if count else 0

    dual, single, full = some(config.dual_blocks), some(config.single_blocks), some(config.full_blocks)
    return replace(config, dual_blocks=dual, single_blocks=single, full_blocks=full)


def device_of(recipe: Recipe) -> str:
    """Where the recipe's workers compute. Raises `UserError` where there is no such device here."""
    if recipe.workers.gpus and not torch.cuda.is_available():
        raise UserError("the recipe's workers have GPUs and there is none here: run it on one, or --set training.workers.gpus=0")
    return "cuda" if recipe.workers.gpus else "cpu"


def setting(cost: MicroBatchCost) -> str:
    """The cost as --set takes it; YAML wants a point in a number with an exponent."""
    return "training.data.cost={" + ", ".join(f"{name}: {value:.4e}" for name, value in cost.model_dump().items()) + "}"


class _Through(nn.Module):
    """In place of a block: hands its tokens on."""

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.streams = streams

    def forward(self, *inputs: Any) -> Any:
        """The first one or two inputs."""
        return inputs[:2] if self.streams == 2 else inputs[0]


def _bridge(trainee: Trainee) -> None:
    """Take the blocks out, so that the rest can be timed."""
    dit = trainee.dit
    dit.dual_blocks = nn.ModuleList(_Through(2) for _ in dit.dual_blocks)
    dit.single_blocks = nn.ModuleList(_Through(1) for _ in dit.single_blocks)


def _timed(trainee: Trainee, packs: Sequence[Pack], device: str, repeats: int, tell: Callable[[str], Any]) -> list[float]:
    """Median seconds of each pack's forward and backward; a first round is not counted.

    Packs take turns, so that what else the machine does for a while falls on all of them.
    """
    dtype = getattr(torch, trainee.recipe.workers.dtype)
    seconds: list[list[float]] = [[] for _ in packs]
    for number in range(repeats + 1):
        for pack, found in zip(packs, seconds, strict=True):
            tell(f"{pack.name}, round {number} of {repeats}")
            examples = _examples(pack, trainee.dit.config, device)
            trainee.zero_grad(set_to_none=True)
            started = _now(device)
            with nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype):  # as the loop on one worker
                losses = trainee(examples)
            losses.total.mean().backward()
            found.append(_now(device) - started)
    return [statistics.median(found[1:]) for found in seconds]


def _examples(pack: Pack, config: DiTConfig, device: str) -> list[Example]:
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    encoders = len(config.text_dims)
    examples = []
    for shape, text in zip(pack.shapes, pack.texts, strict=True):
        parts = [text // encoders + (e < text % encoders) for e in range(encoders)]
        texts = tuple(noise(n, dim) for n, dim in zip(parts, config.text_dims, strict=True))
        inputs, target = noise(config.in_channels, *shape), noise(LATENT_CHANNELS, *shape)
        examples.append(Example(inputs, target, torch.tensor(0.5, device=device), texts, None, "video", "t2v"))
    return examples


def _now(device: str) -> float:
    """Seconds, once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


def _equal(fit: Fit, model: DiTConfig) -> str:
    """At which length attention costs as much as the matrices, measured and counted."""
    counted = counted_cost(model)
    told = f"by counting operations, at {counted.per_token_s / counted.per_pair_s:,.0f}"
    if not fit.cost.per_pair_s:
        return f"Pairs cost nothing here ({told}, attention costs as much as matrices): measure more --tokens."
    return f"Attention costs as much as matrices at {fit.cost.per_token_s / fit.cost.per_pair_s:,.0f} tokens; {told}."


if __name__ == "__main__":
    run_command_line(app)
