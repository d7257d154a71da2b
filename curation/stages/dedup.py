"""Dedup: near-duplicate clips by perceptual hash over several frames, or by the embedding of a model such as DINOv2.

Hashes or embeddings are made during the first decode, the groups once all clips are known. Of a group the clip of the
best technical quality is kept; the others stay in the table with the group's id and their similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from curation import stage
from curation.embedded_samples import EmbeddedSamples
from curation.stage import BackendUse, Row, SourceFacts, StreamFrame
from waver_core.backends.contracts import FrameEmbedder
from waver_core.config import Strict
from waver_core.manifest import Column

N_HASHES = 5
_BANDS = 4
_BLOCK = 4096
_TAKE_ROWS = 100_000


class Options(Strict):
    """When two clips are one."""

    backend: str = "hash"
    """`hash`, or a frame embedder: `dinov2`."""
    backend_options: dict[str, Any] = {}
    samples_per_s: float = Field(4.0, gt=0)
    """Frames that are hashed."""
    embeddings_per_s: float = Field(1.0, gt=0)
    """Frames that are embedded; up to five of them make a clip's embedding."""
    min_similarity: float = Field(0.9, gt=0.5, le=1)
    """Share of equal hash bits, mean over the frames; or cosine of the embeddings."""
    max_bucket: int = Field(64, ge=2)
    """Candidates compared with each clip per hash band; bounds the work where thousands look alike. Embeddings are compared
    one and all."""


_GROUPS = (
    Column("dedup_group", pa.string(), "clip_id of the kept clip of this group of near-duplicates"),
    Column("dedup_similarity", pa.float64(), "share of hash bits equal to the nearest other clip's, or cosine", score=True),
    Column("dedup_keep", pa.bool_(), "whether this clip is the one kept of its group"),
)


class Stage(stage.Stage):
    """Hashes or embeddings in the stream, groups over the table."""

    name = "dedup"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("stream", "table")
    reads = ("short_side_px", "technical_bits_per_pixel", "kind")
    columns = (
        Column("dedup_hashes", pa.list_(pa.uint64(), N_HASHES), "perceptual hashes of five frames evenly spread"),
        *_GROUPS,
    )

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        if options.backend != "hash":
            embedding = Column("dedup_embedding", pa.list_(pa.float16()), "mean embedding of up to five frames, of unit length")
            self.columns = (embedding, *_GROUPS)  # type: ignore[misc]

    def backends(self) -> list[BackendUse]:
        """The embedder, if there is one."""
        o = self.options
        return [] if o.backend == "hash" else [BackendUse("frame_embedder", o.backend, o.backend_options)]

    @cached_property
    def _embedder(self) -> FrameEmbedder:
        embedder: FrameEmbedder = self.backends()[0].create()
        return embedder

    def watch(self, source: SourceFacts) -> HashWatcher | EmbeddingWatcher:
        """A watcher that hashes or embeds a few frames a second."""
        if self.options.backend == "hash":
            return HashWatcher(self.options, source.turns)
        return EmbeddingWatcher(self.options.embeddings_per_s, EmbeddedSamples(self._embedder, source))

    def resolve(self, clips: pa.Table, eligible: np.ndarray) -> dict[str, pa.Array]:
        """Groups over the eligible clips; the others get nulls. Depends on the set of clips, not on their order."""
        ids = clips["clip_id"].to_numpy()
        stored = clips[self.columns[0].name]
        at = np.flatnonzero(eligible & np.asarray(pc.is_valid(stored)))
        at = at[np.argsort(ids[at], kind="stable")]
        picked = clips.take(pa.array(at))
        kinds = pc.dictionary_encode(picked["kind"]).combine_chunks().indices.to_numpy()
        # Piece by piece: a list array's offsets count up to 2^31 values only.
        pieces = [stored.take(pa.array(at[i : i + _TAKE_ROWS])).combine_chunks() for i in range(0, len(at), _TAKE_ROWS)]
        flat = (
            np.concatenate([p.flatten().to_numpy() for p in pieces]).reshape(len(at), -1) if pieces else np.empty((0, N_HASHES))
        )
        if self.options.backend == "hash":
            parent, nearest = group_hashes(flat.astype(np.uint64), kinds, self.options.min_similarity, self.options.max_bucket)
        else:
            parent, nearest = group_embeddings(flat, kinds, self.options.min_similarity)
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


class EmbeddingWatcher:
    """Embeddings of a source at a fixed rate."""

    def __init__(self, per_s: float, samples: EmbeddedSamples) -> None:
        self._per_s, self._samples = per_s, samples
        self._next_s = 0.0

    def add(self, frame: StreamFrame) -> None:
        """Embed one frame in every `1 / per_s` seconds."""
        if frame.time_s < self._next_s:
            return
        self._next_s = (np.floor(frame.time_s * self._per_s + 1e-6) + 1) / self._per_s
        self._samples.add(frame)

    def describe(self, clips: Sequence[Row]) -> list[Row]:
        """One embedding per clip: the mean over the samples nearest to five evenly spread frames, of unit length."""
        found, vectors = self._samples.finish()
        at = np.array(found)
        out = []
        for clip in clips:
            wanted = clip["start_frame"] + (np.arange(N_HASHES) + 0.5) / N_HASHES * (clip["end_frame"] - clip["start_frame"])
            nearest = sorted({int(np.argmin(np.abs(at - w))) for w in wanted})
            mean = np.mean([vectors[i] for i in nearest], axis=0, dtype=np.float32)
            out.append({"dedup_embedding": (mean / np.linalg.norm(mean)).astype(np.float16)})
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


def group_embeddings(
    vectors: np.ndarray, kinds: np.ndarray, min_similarity: float, block: int = _BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Connected groups of clips whose embeddings [N, D] have a cosine of `min_similarity` or more: (root of each row [N],
    cosine to the nearest other clip of its kind [N], 0 where there is none).

    Every pair is compared, block by block, so memory stays at three blocks (about 100 MB) beside the table's own 2 D bytes a
    clip, and time grows with the square: N^2 D floating-point operations. At D = 384 and 100 GFLOP/s 100,000 clips take
    40 seconds and a million an hour; beyond that run the funnel on parts that cannot share clips.
    """
    parent, nearest = np.arange(len(vectors)), np.zeros(len(vectors))
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        blocks = [rows[i : i + block] for i in range(0, len(rows), block)]
        for k, left in enumerate(blocks):
            a = _unit(vectors[left])
            for right in blocks[k:]:
                similarity = a @ _unit(vectors[right]).T
                if right is left:
                    np.fill_diagonal(similarity, 0)
                nearest[left] = np.maximum(nearest[left], similarity.max(axis=1))
                nearest[right] = np.maximum(nearest[right], similarity.max(axis=0))
                alike = similarity >= min_similarity
                for i in np.flatnonzero(alike.any(axis=1)):
                    _join(parent, np.append(right[alike[i]], left[i]))
    return _roots(parent, np.arange(len(vectors))), np.minimum(nearest, 1.0)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """float32, rows of unit length: rounding to float16 has moved them a little."""
    wide = vectors.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _roots(parent: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The smallest member of the group of each."""
    roots = parent[of]
    while (parent[roots] != roots).any():
        roots = parent[roots]
    return roots


def _join(parent: np.ndarray, members: np.ndarray) -> None:
    """Make one group of all groups that these belong to."""
    roots = np.unique(_roots(parent, members))
    parent[roots] = parent[members] = roots[0]
