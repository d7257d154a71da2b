"""Which tokens of a flat batch belong together, and who may attend to whom.

A batch is one flat sequence of tokens: samples of any lengths stand one after another, each with its own text, timestep and
grid of video tokens. So packed and unpacked batches are one code path (Waver §5). In the *joint* order the tokens of a sample
are its text and then its video.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from waver_core.shapes import LatentShape

WINDOWS = {"space": (1, 2, 2), "time": (2, 1, 1)}
"""Windows along time, height and width: the 2x2x1 and 1x1x2 (height x width x time) of Waver §2.2."""


class Segments:
    """Lengths of the samples' parts in a flat sequence."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self.lengths = tuple(lengths)
        self.total = sum(lengths)
        self.uniform = len(set(lengths)) == 1
        self._device = device

    @cached_property
    def sample(self) -> Tensor:
        """Number of the sample that each token belongs to, int64 [N]."""
        counts = torch.tensor(self.lengths, device=self._device)
        return torch.arange(len(self.lengths), device=self._device).repeat_interleave(counts, output_size=self.total)

    def spread(self, x_ND: Tensor, per_sample_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors that broadcast against each other: tokens [S, n, D] and [S, 1, D] where all samples are of one
        length, else [N, D] and [N, D]."""
        if self.uniform:
            return x_ND.unflatten(0, (len(self.lengths), -1)), per_sample_SD[:, None]
        return x_ND, per_sample_SD[self.sample]


class AttentionPlan:
    """A gather of queries, a gather of keys, and how many of each go together. None as index: all, in order."""

    def __init__(
        self, q_lengths: Sequence[int], k_lengths: Sequence[int], q_index: Tensor | None = None, k_index: Tensor | None = None
    ) -> None:
        self.q_lengths, self.k_lengths = tuple(q_lengths), tuple(k_lengths)
        self.q_index, self.k_index = q_index, k_index
        self.q_back = None if q_index is None else torch.argsort(q_index)

    def pairs(self) -> int:
        """Query-key pairs, for counting operations."""
        return sum(q * k for q, k in zip(self.q_lengths, self.k_lengths, strict=True))


class Layout:
    """The samples of a batch: latent shape of each, and its number of text tokens from every encoder."""

    def __init__(
        self,
        shapes: Sequence[LatentShape],
        text_lengths: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> None:
        if len(shapes) != len(text_lengths) or not shapes:
            raise ValueError(f"{len(shapes)} videos and {len(text_lengths)} texts make no batch")
        self.shapes = tuple(shapes)
        self.device = device
        self.text_lengths = tuple(tuple(lengths) for lengths in text_lengths)
        self.video = Segments([s.tokens for s in shapes], device)
        self.text = Segments([sum(lengths) for lengths in text_lengths], device)
        self.joint = Segments([a + b for a, b in zip(self.text.lengths, self.video.lengths, strict=True)], device)
        self._plans: dict[str, AttentionPlan] = {}

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same lengths of text and video."""
        return self.text.uniform and self.video.uniform

    @cached_property
    def _joint_order(self) -> tuple[Tensor, Tensor]:
        """Indices that sort [all text; all video] into the joint order, and back."""
        owner = torch.cat([self.text.sample, self.video.sample])
        order = torch.argsort(owner, stable=True)
        return order, torch.argsort(order)

    def join(self, text: Tensor, video: Tensor) -> Tensor:
        """[L, ...] and [N, ...] -> joint [L + N, ...]."""
        if self.uniform:
            samples = len(self.shapes)
            return torch.cat([text.unflatten(0, (samples, -1)), video.unflatten(0, (samples, -1))], dim=1).flatten(0, 1)
        return torch.cat([text, video])[self._joint_order[0]]

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: joint -> text, video."""
        if self.uniform:
            both = joint.unflatten(0, (len(self.shapes), -1))
            length = self.text.lengths[0]
            return both[:, :length].flatten(0, 1), both[:, length:].flatten(0, 1)
        text, video = joint[self._joint_order[1]].split([self.text.total, self.video.total])
        return text, video

    @cached_property
    def positions(self) -> Tensor:
        """Time, row and column of every video token, int64 [N, 3]; each sample starts at 0."""
        grids = {s.grid: _grid_positions(s.grid) for s in self.shapes}
        return torch.cat([grids[s.grid] for s in self.shapes]).to(self.device)

    def plan(self, kind: str) -> AttentionPlan:
        """Who attends to whom over the joint tokens: "full" (all of a sample), or a kind of window.

        In windows a video token sees its window and all of its sample's text; a text token sees everything. So text carries
        information across windows, and is treated as under full attention.
        """
        if kind not in self._plans:
            lengths = self.joint.lengths
            self._plans[kind] = AttentionPlan(lengths, lengths) if kind == "full" else self._windows(WINDOWS[kind])
        return self._plans[kind]

    def _windows(self, counts: tuple[int, int, int]) -> AttentionPlan:
        q_parts, k_parts = [], []
        start = 0
        for shape, text_length, length in zip(self.shapes, self.text.lengths, self.joint.lengths, strict=True):
            everything = torch.arange(start, start + length)
            text = everything[:text_length]
            q_parts.append(text)
            k_parts.append(everything)
            for window in window_tokens(shape.grid, counts):
                inside = window + start + text_length
                q_parts.append(inside)
                k_parts.append(torch.cat([text, inside]))
            start += length
        q_index, k_index = (torch.cat(parts).to(self.device) for parts in (q_parts, k_parts))
        return AttentionPlan([len(p) for p in q_parts], [len(p) for p in k_parts], q_index, k_index)


def _grid_positions(grid: tuple[int, int, int]) -> Tensor:
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=1)


def window_tokens(grid: tuple[int, int, int], counts: tuple[int, int, int]) -> list[Tensor]:
    """Cut a grid of T x H x W tokens into at most `counts` windows along each axis, as even as whole tokens allow (67 rows are
    34 and 33). Returns the token numbers of each window; every token is in exactly one."""
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    windows = [numbers]
    for axis, count in enumerate(counts):
        windows = [part for w in windows for part in w.tensor_split(min(count, grid[axis]), dim=axis)]
    return [w.flatten() for w in windows]
