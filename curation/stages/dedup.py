"""Dedup: near-duplicate clips by perceptual hash over several frames (embedded; DINOv2 clusters come with `full`).

The hashes are made during the first decode, the groups once all clips are known. Of a group the clip of the best
technical quality is kept; the others stay in the table with the group's id and their similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation import stage
from curation.stage import Row, SourceFacts, StreamFrame
from waver_core.config import Strict
from waver_core.manifest import Column

N_HASHES = 5
_BANDS = 4


class Options(Strict):
    """When two clips are one."""

    samples_per_s: float = Field(4.0, gt=0)
    min_similarity: float = Field(0.9, gt=0.5, le=1)
    """Share of equal hash bits, mean over the frames."""
    max_bucket: int = Field(64, ge=2)
    """Candidates compared with each clip per hash band; bounds the work where thousands look alike."""


class Stage(stage.Stage):
    """Hashes in the stream, groups over the table."""

    name = "dedup"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("stream", "table")
    reads = ("short_side_px", "technical_bits_per_pixel", "kind")
    columns = (
        Column("dedup_hashes", pa.list_(pa.uint64(), N_HASHES), "perceptual hashes of five frames evenly spread"),
        Column("dedup_group", pa.string(), "clip_id of the kept clip of this group of near-duplicates"),
        Column("dedup_similarity", pa.float64(), "share of hash bits equal to the nearest other clip's", score=True),
        Column("dedup_keep", pa.bool_(), "whether this clip is the one kept of its group"),
    )

    def watch(self, source: SourceFacts) -> HashWatcher:
        """A watcher that hashes a few frames a second."""
        return HashWatcher(self.options, source.turns)

    def resolve(self, clips: pa.Table, eligible: np.ndarray) -> dict[str, pa.Array]:
        """Groups over the eligible clips; the others get nulls. Depends on the set of clips, not on their order."""
        ids = clips["clip_id"].to_numpy()
        stored = clips["dedup_hashes"].combine_chunks()
        at = np.flatnonzero(eligible & np.asarray(pc.is_valid(stored)))
        at = at[np.argsort(ids[at], kind="stable")]
        picked = clips.take(pa.array(at))
        hashes = stored.take(pa.array(at)).flatten().to_numpy().astype(np.uint64).reshape(len(at), N_HASHES)
        kinds = pc.dictionary_encode(picked["kind"]).combine_chunks().indices.to_numpy()
        parent, nearest = group_hashes(hashes, kinds, self.options.min_similarity, self.options.max_bucket)
        quality = list(
            zip(
                *(np.nan_to_num(pc.fill_null(picked[c], 0).to_numpy()) for c in ("short_side_px", "technical_bits_per_pixel")),
                strict=True,
            )
        )
        best: dict[int, int] = {}
        for i, root in enumerate(parent):
            if root not in best or quality[i] > quality[best[root]]:
                best[root] = i
        group = np.full(len(ids), None, object)
        similarity = np.full(len(ids), None, object)
        keep = np.full(len(ids), None, object)
        for i, root in enumerate(parent):
            group[at[i]] = ids[at[best[root]]]
            keep[at[i]] = best[root] == i
            similarity[at[i]] = float(nearest[i])
        return {
            "dedup_group": pa.array(group, pa.string()),
            "dedup_similarity": pa.array(similarity, pa.float64()),
            "dedup_keep": pa.array(keep, pa.bool_()),
        }


class HashWatcher:
    """Perceptual hashes of a source at a fixed rate."""

    def __init__(self, options: Options, turns: int) -> None:
        self._options, self._turns = options, turns
        self._next_s = 0.0
        self._at: list[int] = []
        self._hashes: list[int] = []

    def add(self, frame: StreamFrame) -> None:
        """Hash one frame in every `1 / samples_per_s` seconds."""
        if frame.time_s < self._next_s:
            return
        self._next_s = (np.floor(frame.time_s * self._options.samples_per_s + 1e-6) + 1) / self._options.samples_per_s
        upright = np.rot90(frame.small, self._turns) if self._turns else frame.small
        self._at.append(frame.index)
        self._hashes.append(perceptual_hash(upright))

    def describe(self, clips: Sequence[Row]) -> list[Row]:
        """Five hashes per clip, from the samples nearest to evenly spread frames."""
        at = np.array(self._at)
        out = []
        for clip in clips:
            wanted = clip["start_frame"] + (np.arange(N_HASHES) + 0.5) / N_HASHES * (clip["end_frame"] - clip["start_frame"])
            nearest = [int(np.argmin(np.abs(at - w))) for w in wanted]
            out.append({"dedup_hashes": [self._hashes[i] for i in nearest]})
        return out


def perceptual_hash(rgb: np.ndarray) -> int:
    """64 bits of a picture [H, W, 3]: signs of the low frequencies of its luma's cosine transform about their median."""
    grey = cv2.resize(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[1:9, 1:9].ravel()
    bits = low > np.median(low)
    return int(np.packbits(bits).view(">u8")[0])


def group_hashes(hashes: np.ndarray, kinds: np.ndarray, min_similarity: float, max_bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """Connected groups of near-duplicates: (root index of each row [N], similarity to the nearest candidate [N]).

    Candidates share a band of 16 bits at the same of the five frames (locality-sensitive hashing), so the cost grows
    with the number of look-alikes and not with the square of the table.
    """
    n = len(hashes)
    parent = np.arange(n)
    nearest = np.zeros(n)
    if n < 2:
        return parent, nearest

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for frame in range(hashes.shape[1]):
        for band in range(_BANDS):
            key = (hashes[:, frame] >> np.uint64(16 * band)) & np.uint64(0xFFFF)
            order = np.lexsort((np.arange(n), key))
            for step in range(1, min(max_bucket, n)):
                a, b = order[:-step], order[step:]
                same = (key[a] == key[b]) & (kinds[a] == kinds[b])
                if not same.any():
                    break
                a, b = a[same], b[same]
                similarity = 1 - np.bitwise_count(hashes[a] ^ hashes[b]).mean(axis=1) / 64
                np.maximum.at(nearest, a, similarity)
                np.maximum.at(nearest, b, similarity)
                for i, j in zip(a[similarity >= min_similarity], b[similarity >= min_similarity], strict=True):
                    ri, rj = root(int(i)), root(int(j))
                    parent[max(ri, rj)] = min(ri, rj)
    return np.array([root(i) for i in range(n)]), nearest
