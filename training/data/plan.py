"""Which sample is trained when: epochs, shuffles, packs, buckets and steps (Waver §5, bucket dataloader).

Everything is a function of (seed, epoch, row), drawn from a hash of these counters, never of the number of workers, of the
time or of what was drawn before. So a run can be resumed at any step, on another number of workers, and goes on as it was.

    rows -> draws: a clip of weight w is drawn floor(w) or ceil(w) times an epoch, w times in the mean
         -> micro-batches: packs of several lengths (`spfhp`), or samples of one shape (`bucket`)
         -> buckets: micro-batches of about the same cost (`data.cost`), so that no worker waits for another
         -> steps: micro-batches of one bucket, `data.micro_batches_per_step` of them; steps of all buckets are shuffled
         -> shares: those of a step, dealt to workers by their cost (`Step.share`)

The last step of each bucket in an epoch is smaller where the micro-batches do not fill it: none is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.data.cost import MicroBatchCost, counted_cost, sample_pairs, video_pairs
from training.data.counter_hash import hash64, uniform
from training.data.epochs import Draw, EpochSteps, MicroBatches, Step, deal_steps
from training.data.packing import PackShape, fill, per_pack, shapes_of
from training.data.samples import KINDS, check_dropped
from training.recipe import Recipe
from training.trainee import model_config
from waver_core.dit import DiTConfig
from waver_core.errors import UserError
from waver_core.shapes import VideoShape

TEXT_TOKENS = 256
"""Taken for the length of a sample's text where the table has no column `text_tokens`."""
_REPEATS, _ORDER = 1, 2
_ROWS_PER_LENGTH = 16


class _Kind(NamedTuple):
    """The samples of a kind that are trained on, those of one clip next to one another."""

    name: str
    rows: np.ndarray
    """int64 [N], of the table"""
    clip_row: np.ndarray
    """int64 [N]: the first row of the sample's clip"""
    low: np.ndarray
    """float64 [N]: sum of the weights of the clip's earlier samples"""
    high: np.ndarray
    """float64 [N]: the same and its own"""


class Plan:
    """The order of training on a table of samples (`SampleTable.table`, or `EncodedSamples.table`) under a recipe.

    `dropped` is `SampleTable.dropped`: where more of a kind could not be used than `data.max_dropped_share`, or where nothing
    is left to draw, it raises `UserError`. Row numbers are positions in the table, so a plan belongs to one table.
    """

    def __init__(self, samples: pa.Table, recipe: Recipe, dropped: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self._data, self._recipe = recipe.data, recipe
        self._dropped = {kind: dict(reasons) for kind, reasons in (dropped or {}).items()}
        self._dropped_share = check_dropped(self._dropped, samples, recipe)
        model = _model(recipe)
        self.cost: MicroBatchCost = recipe.data.cost or counted_cost(model)
        """By which micro-batches are bucketed and dealt."""
        self._shape_names, self._shape_of, self._tokens, self._pairs, seen = _lengths(samples, recipe, model)
        longest = np.ones(len(self._shape_names), np.int64)
        np.maximum.at(longest, self._shape_of, self._tokens)
        self._samples_per_batch = np.clip(self._data.micro_batch_tokens // longest, 1, self._data.max_per_pack)
        kinds = {k: pc.fill_null(pc.equal(samples["kind"], k), False).to_numpy() for k in KINDS}
        self._pair_share = {k: _share_of_pairs(self._shape_of[kinds[k]], *seen) for k in KINDS}
        held_out = samples["held_out"].to_numpy()
        self._held_out = {k: np.flatnonzero(kinds[k] & held_out) for k in KINDS}
        rows = {k: np.flatnonzero(kinds[k] & ~held_out) for k in KINDS}
        weights = self._weights(samples["weight"].to_numpy(), rows)
        clips = samples["clip_id"].cast(pa.large_string()).combine_chunks().dictionary_encode().indices.to_numpy()
        self._kinds = [_by_clip(k, rows[k], clips, weights) for k in KINDS if weights[rows[k]].sum() > 0]
        if not self._kinds:
            raise UserError(f"stage '{recipe.stage}' has nothing to draw: no sample has a weight and is not held out")
        self._packed: dict[bytes, list[PackShape]] = {}
        self._built: dict[int, EpochSteps] = {}
        self._ends: list[int] = []

    def steps(self, epoch: int) -> Sequence[Step]:
        """Steps of an epoch, counted from 0, in order; those after `total_steps()` left out (none in epochs after the last).

        A step's micro-batches are all of one bucket. Steps are made when they are looked at, so a large epoch takes little room.
        """
        if epoch < 0:
            raise ValueError(f"epochs are counted from 0, there is no {epoch}")
        steps = self._epoch(epoch)
        left = self.total_steps() - self._end(epoch - 1) if epoch < self._epochs else 0
        return steps if left >= len(steps) else steps[: max(0, left)]

    def total_steps(self) -> int:
        """Steps of the stage: `schedule.max_steps`, or as many as its epochs take, a part of one in proportion."""
        return self._total

    def locate(self, step_index: int) -> tuple[int, int]:
        """(epoch, step within it) of a step of the whole stage. Raises `IndexError` outside 0 .. total_steps() - 1."""
        if not 0 <= step_index < self._total:
            raise IndexError(f"step {step_index} is not one of the stage's {self._total}")
        epoch = 0
        while self._end(epoch) <= step_index:
            epoch += 1
        return epoch, step_index - self._end(epoch - 1)

    def held_out(self) -> tuple[tuple[Draw, ...], ...]:
        """Micro-batches of the samples kept for the held-out loss, each once; the same whenever they are asked for."""
        out: list[tuple[Draw, ...]] = []
        for kind, rows in self._held_out.items():
            batches = self._batches(kind, rows, np.zeros(len(rows), np.int64), 0)
            out += [batches.draws(i, 0) for i in range(len(batches.bucket))]
        return tuple(out)

    def tokens(self, step: Step) -> int:
        """Tokens of a step's samples, text included."""
        return int(sum(self._tokens[draw.row] for batch in step.micro_batches for draw in batch))

    @cached_property
    def report(self) -> dict[str, dict[str, Any]]:
        """What epoch 0 draws, by kind: samples (without those held out), held_out, drawn, tokens, micro_batches, steps,
        efficiency (tokens over room), dropped (reason -> clips), dropped_share; and under `buckets` the same for each."""
        summary = self._epoch(0).summary(self._tokens, self._data.micro_batch_tokens)
        out: dict[str, dict[str, Any]] = {}
        for kind in KINDS:
            rows = next((k.rows for k in self._kinds if k.name == kind), np.zeros(0))
            if not len(rows) and not self._dropped.get(kind):
                continue
            buckets = {name: facts for name, facts in summary.items() if name.startswith(f"{kind}/")}
            sums = {key: sum(b[key] for b in buckets.values()) for key in ("drawn", "tokens", "micro_batches", "steps", "room")}
            out[kind] = {
                "samples": len(rows),
                "held_out": len(self._held_out[kind]),
                **sums,
                "efficiency": sums["tokens"] / sums["room"] if sums["room"] else 1.0,
                "dropped": self._dropped.get(kind, {}),
                "dropped_share": self._dropped_share.get(kind, 0.0),
                "buckets": buckets,
            }
        return out

    @cached_property
    def _total(self) -> int:
        if self._recipe.schedule.max_steps is not None:
            return self._recipe.schedule.max_steps
        whole = int(self._recipe.epochs)
        part = self._recipe.epochs - whole
        return self._end(whole - 1) + (max(1, round(part * self._n_steps(whole))) if part > 1e-9 else 0)

    @property
    def _epochs(self) -> int:
        """How many epochs are begun."""
        return self.locate(self._total - 1)[0] + 1

    def _end(self, epoch: int) -> int:
        """Steps of all epochs up to and with this one."""
        while len(self._ends) <= epoch:
            self._ends.append((self._ends[-1] if self._ends else 0) + self._n_steps(len(self._ends)))
        return self._ends[epoch] if epoch >= 0 else 0

    def _weights(self, weights: np.ndarray, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Mean number of draws an epoch of each row [table]: its weight, images scaled to their share of the samples."""
        share = self._data.image_share
        if share is None or not self._recipe.video_sizes:
            return weights
        sums = {k: float(weights[rows[k]].sum()) for k in KINDS}
        lacking = [k for k, wanted in (("image", share > 0), ("video", share < 1)) if wanted and not sums[k]]
        if lacking:
            fix = f"curate some, or set data.image_share to {'0' if lacking[0] == 'image' else '1'} or null"
            raise UserError(f"data.image_share is {share}, but stage '{self._recipe.stage}' has no {lacking[0]} sample: {fix}")
        weights = weights.copy()
        if share == 1:
            weights[rows["video"]] = 0.0
        elif sums["image"]:
            weights[rows["image"]] *= share / (1 - share) * sums["video"] / sums["image"]
        return weights

    def _draws(self, kind: _Kind, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows drawn in an epoch and which repeat of its row each is, int64 [draws].

        A clip with weight w gets a random offset u in [0, 1) and is drawn once for each whole number in [u, u + w) that its
        weights pass, so its windows share its draws: with one window that is floor(w), and one more as often as the rest of w.
        """
        offset = uniform(self._data.seed, epoch, _REPEATS, kind.clip_row)
        times = (np.floor(kind.high + offset) - np.floor(kind.low + offset)).astype(np.int64)
        ends = np.cumsum(times)
        return np.repeat(kind.rows, times), np.arange(ends[-1]) - np.repeat(ends - times, times)

    def _batches(self, kind: str, rows: np.ndarray, repeats: np.ndarray, epoch: int) -> MicroBatches:
        """Micro-batches of one kind's draws; a bucket has the name of a shape, or of a class of cost."""
        key = hash64(self._data.seed, epoch, _ORDER, rows, repeats)
        if self._data.packing == "spfhp":
            tokens = _rounded(self._tokens[rows], self._data.micro_batch_tokens)
            shapes = self._pack_shapes(tokens)
            packs = fill(shapes, tokens, key)
            bucket = per_pack(shapes, self._cost_class(kind, shapes))
            names = {int(c): f"{kind}/cost{int(c):+d}" for c in np.unique(bucket)}
            return MicroBatches(rows[packs.rows], repeats[packs.rows], packs.starts, bucket, names)
        shape = self._shape_of[rows]
        order = np.lexsort((key, shape))
        starts, buckets = [np.zeros(1, np.int64)], []
        for code, first, n in _runs(shape[order]):
            each = self._samples_per_batch[code]
            starts.append(first + np.minimum(np.arange(each, n + each, each), n))
            buckets.append(np.full(len(starts[-1]), code))
        bucket = np.concatenate(buckets) if buckets else np.zeros(0, np.int64)
        names = {int(c): f"{kind}/{self._shape_names[c]}" for c in np.unique(bucket)}
        return MicroBatches(rows[order], repeats[order], np.concatenate(starts), bucket, names)

    def _cost_class(self, kind: str, shapes: Sequence[PackShape]) -> np.ndarray:
        """int64 [shapes]: class of cost of packs of one kind. It must follow from lengths, as packs are made from them before
        rows are dealt to them, so where attention is windowed a pair counts as much as the mean over the kind's samples."""
        lengths = np.array([length for s in shapes for length in s.lengths], np.int64)
        starts = np.cumsum([0, *(len(s.lengths) for s in shapes)])[:-1]
        tokens, squares = (np.add.reduceat(x, starts) if len(starts) else x for x in (lengths, lengths**2))
        seconds = self.cost.seconds(tokens, squares * self._pair_share[kind])
        return self.cost.classes(seconds, self._data.micro_batch_tokens)

    def _costs(self, batches: Sequence[np.ndarray]) -> np.ndarray:
        """Seconds of micro-batches, given the rows of each."""
        rows = np.concatenate(batches)
        starts = np.cumsum([0, *(len(batch) for batch in batches)])[:-1]
        return self.cost.of_packs(self._tokens[rows], self._pairs[rows], starts)

    def _pack_shapes(self, tokens: np.ndarray) -> list[PackShape]:
        """Packs for these lengths. Kept by how often each occurs: where every weight is whole that is the same every epoch."""
        found, counts = np.unique(tokens, return_counts=True)
        key = np.stack([found, counts]).tobytes()
        if key not in self._packed:
            if len(self._packed) >= 2 * len(KINDS):
                self._packed.clear()
            self._packed[key] = shapes_of(tokens, self._data.micro_batch_tokens, self._data.max_per_pack)
        return self._packed[key]

    def _n_steps(self, epoch: int) -> int:
        """Steps of a whole epoch, without dealing rows to packs."""
        per_step, total = self._data.micro_batches_per_step, 0
        for kind in self._kinds:
            rows, _ = self._draws(kind, epoch)
            if self._data.packing == "spfhp":
                shapes = self._pack_shapes(_rounded(self._tokens[rows], self._data.micro_batch_tokens))
                batches = np.unique(per_pack(shapes, self._cost_class(kind.name, shapes)), return_counts=True)[1]
            else:
                drawn = np.bincount(self._shape_of[rows], minlength=len(self._samples_per_batch))
                batches = np.ceil(drawn / self._samples_per_batch)
            total += int(np.ceil(batches / per_step).sum())
        return total

    def _epoch(self, epoch: int) -> EpochSteps:
        """A whole epoch. The last one asked for is kept."""
        if epoch not in self._built:
            batches = [self._batches(k.name, *self._draws(k, epoch), epoch) for k in self._kinds]
            self._built = {epoch: deal_steps(batches, self._data.micro_batches_per_step, self._data.seed, epoch, self._costs)}
        return self._built[epoch]


def _by_clip(name: str, rows: np.ndarray, clips: np.ndarray, weights: np.ndarray) -> _Kind:
    """Sort rows by clip, and sum the weights within each."""
    rows = rows[np.argsort(clips[rows], kind="stable")]
    first = np.flatnonzero(np.concatenate([[True], clips[rows][1:] != clips[rows][:-1]]))
    n_windows = np.diff(np.append(first, len(rows)))
    of = np.repeat(first, n_windows)
    weight = weights[rows]
    low = np.zeros(len(rows))
    for back in range(1, int(n_windows.max())):
        later = np.flatnonzero(np.arange(len(rows)) - of >= back)
        low[later] += weight[later - back]
    return _Kind(name, rows, rows[of], low, low + weight)


def _model(recipe: Recipe) -> DiTConfig:
    """The recipe's network; how wide its texts are does not bear on the plan."""
    return model_config(recipe, (1,) * len(recipe.encoders.text))


class _Seen(NamedTuple):
    """Of every shape that occurs [shapes]: video tokens, and the pairs among them."""

    tokens: np.ndarray
    pairs: np.ndarray


def _lengths(samples: pa.Table, recipe: Recipe, model: DiTConfig) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, _Seen]:
    """Names of the shapes that occur (frames x height x width in px); of each row [N] its shape, its tokens with text, and the
    pairs of tokens that see each other; and the same of the shapes, without text."""
    columns = [samples[name].to_numpy().astype(np.int64) for name in ("frames", "height_px", "width_px")]
    found, code = np.unique(columns[0] << 40 | columns[1] << 20 | columns[2], return_inverse=True)
    shapes = [VideoShape(int(v) >> 40, int(v) >> 20 & 0xFFFFF, int(v) & 0xFFFFF) for v in found]
    seen = _Seen(
        np.array([shape.latent.tokens for shape in shapes], np.int64),
        np.array([video_pairs(shape.latent.grid, model) for shape in shapes], np.int64),
    )
    known = "text_tokens" in samples.column_names
    text = samples["text_tokens"].to_numpy().astype(np.int64) if known else np.full(len(samples), TEXT_TOKENS, np.int64)
    multiple, encoders = recipe.data.text_multiple, len(recipe.encoders.text)
    text = (text + encoders * (multiple - 1)) // multiple * multiple  # the most that rounding up each encoder's part can make
    pairs = sample_pairs(text, seen.tokens[code], seen.pairs[code])
    return ["x".join(map(str, shape)) for shape in shapes], code, seen.tokens[code] + text, pairs, seen


def _share_of_pairs(shape_of: np.ndarray, tokens: np.ndarray, pairs: np.ndarray) -> float:
    """Pairs of video tokens that see each other, of all pairs of samples of these shapes; 1 under full attention."""
    counts = np.bincount(shape_of, minlength=len(tokens)).tolist()
    everything = sum(n * t * t for n, t in zip(counts, tokens.tolist()))
    return sum(n * p for n, p in zip(counts, pairs.tolist())) / everything if everything else 1.0


def _rounded(tokens: np.ndarray, capacity: int) -> np.ndarray:
    """Lengths [draws] to pack by: rounded up until about `_ROWS_PER_LENGTH` draws share one, by at most 1/32 of the mean.

    Where nearly every length is unlike all others, as in small collections, packs would hold the same samples every epoch.
    """
    grain, limit = 1, tokens.mean() / 32 if len(tokens) else 0
    while 2 * grain <= limit and len(np.unique(-(-tokens // grain))) * _ROWS_PER_LENGTH > len(tokens):
        grain *= 2
    return np.where(tokens <= capacity, np.minimum(-(-tokens // grain) * grain, capacity), tokens)


def _runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(value, first index, length) of every run of equal values."""
    first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else np.zeros(0, np.int64)
    return list(zip(values[first].tolist(), first.tolist(), np.diff(np.append(first, len(values))).tolist()))
