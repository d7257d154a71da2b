"""Which tokens of a flat batch belong together, and who may attend to whom.

A batch is one flat sequence of tokens: samples of any lengths stand one after another, each with its own text, timestep and
grid of video tokens. So packed and unpacked batches are one code path (Waver §5). In the *joint* order the tokens of a sample
are its text and then its video.

Where several workers compute one batch together (Ulysses), each holds a part of the tokens: the text of the whole batch and its
video are each cut into as many contiguous parts as there are workers, as even as whole tokens allow. A worker's own tokens are a
flat batch again, of the same samples, in which some may have no token; so blocks know nothing of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from waver_core.dit.attention import AttentionPlan, SequenceGroup
from waver_core.dit.permute import permuted, spread_rows
from waver_core.shapes import LatentShape

WINDOWS = {"space": (1, 2, 2), "time": (2, 1, 1)}
"""Windows along time, height and width: the 2x2x1 and 1x1x2 (height x width x time) of Waver §2.2."""


class Segments:
    """Lengths of the samples' parts in a flat sequence."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str, *, uniform: bool = True) -> None:
        self.lengths = tuple(lengths)
        self.samples = len(lengths)
        self.total = sum(lengths)
        self.uniform = uniform and len(set(lengths)) == 1
        self._device = device

    @cached_property
    def sample(self) -> Tensor:
        """Number of the sample that each token belongs to, int64 [N]."""
        counts = torch.tensor(self.lengths, device=self._device)
        return torch.arange(self.samples, device=self._device).repeat_interleave(counts, output_size=self.total)

    def spread(self, x_ND: Tensor, per_sample_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors that broadcast against each other: tokens [S, n, D] and [S, 1, D] where all samples are of one
        length, else [N, D] and [N, D]."""
        if self.uniform:
            return x_ND.unflatten(0, (self.samples, self.total // self.samples)), per_sample_SD[:, None]
        return x_ND, spread_rows(per_sample_SD, self.sample)


class Layout:
    """The samples of a batch: latent shape of each, and its number of text tokens from every encoder; with a group of workers
    what one of them holds. `video`, `text` and `joint` are the own tokens."""

    def __init__(
        self,
        shapes: Sequence[LatentShape],
        text_lengths: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        group: SequenceGroup | None = None,
    ) -> None:
        if len(shapes) != len(text_lengths) or not shapes:
            raise ValueError(f"{len(shapes)} videos and {len(text_lengths)} texts make no batch")
        self.shapes = tuple(shapes)
        self.device = device
        self.text_lengths = tuple(tuple(lengths) for lengths in text_lengths)
        self.group = group if group is not None and group.size > 1 else None
        self._texts = tuple(sum(lengths) for lengths in text_lengths)
        self._videos = tuple(s.tokens for s in shapes)
        rank, size = (self.group.rank, self.group.size) if self.group else (0, 1)
        self._text_parts, self._video_parts = _parts(self._texts, size), _parts(self._videos, size)
        own = self._text_parts[rank], self._video_parts[rank]
        self.uniform = all(len(set(lengths)) == 1 for lengths in own)
        """Whether all samples have the same lengths of text and video. If not, no part is treated as if: a compiled block then
        serves every batch in one of two ways."""
        self.text, self.video = (Segments(lengths, device, uniform=self.uniform) for lengths in own)
        self.joint = Segments([a + b for a, b in zip(*own, strict=True)], device, uniform=self.uniform)
        self._plans: dict[str, AttentionPlan] = {}
        self.joint_order: Tensor | None = None
        """Indices that sort [all own text; all own video] into the joint order; None where reshaping does it"""
        self.joint_back: Tensor | None = None
        if not self.uniform:
            owner = torch.cat([self.text.sample, self.video.sample])
            self.joint_order = torch.argsort(owner, stable=True)
            self.joint_back = torch.argsort(self.joint_order)
            _ = self.text.sample, self.video.sample, self.joint.sample  # made here, so that compiled blocks find them

    def join(self, text: Tensor, video: Tensor) -> Tensor:
        """[L, ...] and [N, ...] -> joint [L + N, ...]."""
        if self.joint_order is None or self.joint_back is None:
            samples = self.text.samples
            if samples == 1:
                return torch.cat([text, video])  # no view: compiled blocks would want graphs of their own for views
            parts = (x.unflatten(0, (samples, x.shape[0] // samples)) for x in (text, video))
            return torch.cat(tuple(parts), dim=1).flatten(0, 1)
        return permuted(torch.cat([text, video]), self.joint_order, self.joint_back)

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: joint -> text, video."""
        if self.joint_order is None or self.joint_back is None:
            samples, length = self.text.samples, self.text.total // self.text.samples
            both = joint.unflatten(0, (samples, joint.shape[0] // samples))
            return both[:, :length].flatten(0, 1), both[:, length:].flatten(0, 1)
        sorted_back = permuted(joint, self.joint_back, self.joint_order)
        return sorted_back[: self.text.total], sorted_back[self.text.total :]

    def own_text(self, text: Tensor) -> Tensor:
        """Of the text tokens of all samples [L, ...] those that this worker holds."""
        return self._own(text, self._text_parts)

    def own_video(self, video: Tensor) -> Tensor:
        """Of the video tokens of all samples [N, ...] those that this worker holds."""
        return self._own(video, self._video_parts)

    def whole_video(self, own: Tensor) -> Tensor:
        """The way back: on every worker of the group the video tokens of all."""
        if self.group is None:
            return own
        return self.group.whole(own, [sum(part) for part in self._video_parts])

    @cached_property
    def positions(self) -> Tensor:
        """Time, row and column of every own video token, int64 [N, 3]; each sample starts at 0."""
        grids = {s.grid: _grid_positions(s.grid) for s in self.shapes}
        return self.own_video(torch.cat([grids[s.grid] for s in self.shapes])).to(self.device)

    def plan(self, kind: str) -> AttentionPlan:
        """Who attends to whom over the joint tokens: "full" (all of a sample), or a kind of window.

        In windows a video token sees its window and all of its sample's text; a text token sees everything. So text carries
        information across windows, and is treated as under full attention.
        """
        if kind not in self._plans:
            lengths = [a + b for a, b in zip(self._texts, self._videos, strict=True)]
            parts: tuple[tuple[int, ...], ...] = (tuple(lengths), tuple(lengths))
            indices: tuple[Tensor | None, Tensor | None] = (None, None)
            if kind != "full":
                parts, indices = self._windows(WINDOWS[kind])
            if self.group is not None and (kind != "full" or len(lengths) > 1):  # keys of one sample may come in any order
                where = self._exchanged()
                indices = (where, where) if kind == "full" else (where[indices[0]], where[indices[1]])
            own = None if self.group is None else tuple(sum(a) + sum(b) for a, b in zip(self._text_parts, self._video_parts))
            on_device = (i if i is None else i.to(self.device) for i in indices)
            self._plans[kind] = AttentionPlan(*parts, *on_device, group=self.group, parts=own, device=self.device)
        return self._plans[kind]

    def _own(self, x: Tensor, parts: Sequence[Sequence[int]]) -> Tensor:
        if self.group is None:
            return x
        ends = list(accumulate((sum(part) for part in parts), initial=0))
        return x[ends[self.group.rank] : ends[self.group.rank + 1]]

    def _windows(self, counts: tuple[int, int, int]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[Tensor, Tensor]]:
        """Lengths of queries and keys, and which joint tokens they are."""
        q_parts, k_parts = [], []
        start = 0
        for shape, text_length in zip(self.shapes, self._texts, strict=True):
            everything = torch.arange(start, start + text_length + shape.tokens)
            text = everything[:text_length]
            q_parts.append(text)
            k_parts.append(everything)
            for window in window_tokens(shape.grid, counts):
                inside = window + start + text_length
                q_parts.append(inside)
                k_parts.append(torch.cat([text, inside]))
            start += len(everything)
        lengths = tuple(len(p) for p in q_parts), tuple(len(p) for p in k_parts)
        return lengths, (torch.cat(q_parts), torch.cat(k_parts))

    def _exchanged(self) -> Tensor:
        """Where each joint token of the whole batch stands once workers have exchanged theirs, int64 [N]: their tokens follow one
        another, each worker's in its own joint order."""
        starts = list(accumulate((a + b for a, b in zip(self._texts, self._videos, strict=True)), initial=0))
        text_done, video_done = [0] * len(self.shapes), [0] * len(self.shapes)
        tokens = []
        for text_part, video_part in zip(self._text_parts, self._video_parts, strict=True):
            for s, (n_text, n_video) in enumerate(zip(text_part, video_part, strict=True)):
                first, video = starts[s] + text_done[s], starts[s] + self._texts[s] + video_done[s]
                tokens += [torch.arange(first, first + n_text), torch.arange(video, video + n_video)]
                text_done[s] += n_text
                video_done[s] += n_video
        order = torch.cat(tokens)
        where = torch.empty_like(order)
        where[order] = torch.arange(len(order))
        return where


def _parts(lengths: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Cut a flat sequence of samples evenly: for each of `size` workers how many tokens of every sample it holds."""
    ends = list(accumulate(lengths, initial=0))
    cuts = [ends[-1] * r // size for r in range(size + 1)]
    return [tuple(max(0, min(high, end) - max(low, start)) for start, end in pairwise(ends)) for low, high in pairwise(cuts)]


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
