"""Floating point operations of the transformer, counted exactly: what MFU is a share of (Waver §5, Table 3).

A matrix product of [m, k] and [k, n] counts 2 m k n. Attention is bidirectional, so every query meets every key that the block
lets it see, 4 D operations a pair (scores and weighted sum over all heads); windows see fewer. Norms, activations and rotations
are left out, as is usual, and so is what checkpointing computes again: MFU, not HFU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple

from waver_core.dit import DiTConfig
from waver_core.dit.layout import WINDOWS
from waver_core.shapes import LatentShape

TIME_FEATURES = 256
"""Sinusoids of a timestep."""

TextLength = int | Sequence[int]
"""Text tokens of a sample, from every encoder; one number is shared out evenly among them."""


class Flops(NamedTuple):
    """Operations of one forward over a micro-batch, by where they are done."""

    linear: int
    """Projections and MLPs of all blocks"""
    attention: int
    """Scores and weighted sums of all blocks"""
    modulation: int
    """What turns the timestep into shifts, scales and gates; per sample, not per token"""
    embedding: int
    """Patches, texts and timesteps on their way in, the velocity on its way out"""

    @property
    def forward(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def training(self) -> int:
        """Forward and backward: every product has two in backward, for its input and for its weight (or second factor)."""
        return 3 * self.forward

    @property
    def attention_share(self) -> float:
        """Part of the operations that is attention, 0 to 1."""
        return self.attention / self.forward


def step_flops(config: DiTConfig, shapes: Sequence[LatentShape], text_lengths: Sequence[TextLength]) -> Flops:
    """Operations of a forward over samples of these shapes and texts; the alignment head of §4.2 is left out."""
    if len(shapes) != len(text_lengths):
        raise ValueError(f"{len(shapes)} videos and {len(text_lengths)} texts make no batch")
    width, samples = config.width, len(shapes)
    texts = [_by_encoder(length, len(config.text_dims)) for length in text_lengths]
    video = sum(shape.tokens for shape in shapes)
    text = sum(map(sum, texts))
    streams = 2 * config.dual_blocks + config.single_blocks
    token = 2 * width * (4 * width + 2 * config.mlp_width)  # query, key, value and output; then the MLP
    read = sum(2 * length * width * (dim + width) for parts in texts for length, dim in zip(parts, config.text_dims, strict=True))
    return Flops(
        linear=token * config.blocks * (video + text),
        attention=sum(attention_by_block(config, shapes, text_lengths)),
        modulation=2 * samples * width * width * (6 * streams + 2),
        embedding=2 * video * width * (config.in_features + config.out_features)
        + read
        + 2 * samples * width * (TIME_FEATURES + width),
    )


def attention_by_block(config: DiTConfig, shapes: Sequence[LatentShape], text_lengths: Sequence[TextLength]) -> list[int]:
    """Operations of attention in the forward of each block; a refiner's differ."""
    lengths = [text if isinstance(text, int) else sum(text) for text in text_lengths]
    kinds = [config.attention_kind(block) for block in range(config.blocks)]
    each = {
        kind: 4 * config.width * sum(attention_pairs(shape, text, kind) for shape, text in zip(shapes, lengths, strict=True))
        for kind in dict.fromkeys(kinds)
    }
    return [each[kind] for kind in kinds]


@cache
def attention_pairs(shape: LatentShape, text: int, kind: str) -> int:
    """Query-key pairs of one sample in a block of a kind ("full", "space" or "time"): what `Layout(...).plan(kind).pairs()`
    counts, without a tensor of all tokens."""
    video = shape.tokens
    if kind == "full":
        return (video + text) ** 2
    # Text sees all; a video token sees all text and its window. Windows are products of parts, so their squares add up by axes.
    inside = prod(_squares(n, parts) for n, parts in zip(shape.grid, WINDOWS[kind], strict=True))
    return text * (text + video) + video * text + inside


def _squares(length: int, parts: int) -> int:
    """Sum of the squared lengths of `length` cut into at most so many even parts."""
    parts = min(parts, length)
    short, longer = divmod(length, parts)
    return longer * (short + 1) ** 2 + (parts - longer) * short**2


def _by_encoder(length: TextLength, encoders: int) -> tuple[int, ...]:
    if isinstance(length, int):
        return tuple(length // encoders + (e < length % encoders) for e in range(encoders))
    if len(length) != encoders:
        raise ValueError(f"{len(length)} text lengths for {encoders} encoders")
    return tuple(length)
