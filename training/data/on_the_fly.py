"""Samples that are encoded when they are asked for: for small sets, and for trying out what is not worth keeping."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from training.data.byte_cache import ByteCache
from training.data.shards import Sample, sample_of
from training.encoding import ClipEncoder
from training.recipe import Recipe
from waver_core.errors import UserError


class ClipSamples:
    """`EncodedSamples` without a folder: the same rows, values (rounded as in a shard) and constants, from the clips themselves.

    `table` is the sample table with `text_tokens`, for which every caption is encoded once at the start.
    """

    def __init__(self, samples: pa.Table, recipe: Recipe, cache_bytes: int = 512 << 20) -> None:
        """Raises `ConfigError` or `BackendUnavailable` where an encoder is missing."""
        self._samples, self._recipe, self._cache_bytes = samples, recipe, cache_bytes
        self._encoder = ClipEncoder(recipe)
        tokens = self._encoder.text_tokens(samples["captions"].to_pylist())
        self.table = samples.append_column("text_tokens", pa.array(tokens, pa.int32()))
        self.constants: dict[str, np.ndarray] = self._encoder.constants()
        self._cache = ByteCache(cache_bytes)

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> tuple[type[ClipSamples], tuple[pa.Table, Recipe, int]]:
        return ClipSamples, (self._samples, self._recipe, self._cache_bytes)

    def __getitem__(self, row: int) -> Sample:
        """The sample of a row of `table`. Raises `IndexError` beyond it, `UserError` for a clip that cannot be encoded."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        sample = self._cache.get(row)
        if sample is None:
            result = self._encoder.encode(self._samples.slice(row, 1).to_pylist())[0]
            if isinstance(result, UserError):
                raise result
            if isinstance(result, Exception):
                uri, mend = self._samples["source_uri"][row], "encode first (training/encode.py), which leaves such clips out"
                raise UserError(f"{uri} cannot be encoded ({type(result).__name__}: {result}): {mend}") from result
            sample = sample_of(result, self._encoder.dims)
            self._cache.put(row, sample, sample.nbytes)
        return sample
