"""Random numbers that are a function of counters alone: who asks, when and in which order changes nothing.

SplitMix64's output function (Steele, Lea and Flood 2014) chained over the counters, on whole arrays at once. The plan of an
epoch, and whatever else must come out the same on any number of workers, is drawn from here.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_WORD = 8


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit of the input touches every bit of the output; x is an array, not a scalar."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*counters: int | np.ndarray) -> np.ndarray:
    """uint64 [N] of integers or arrays [N] of them (an integer stands for all N); their order matters."""
    state = np.zeros(1, np.uint64)
    for counter in counters:
        word = np.array([counter & _MASK], np.uint64) if isinstance(counter, int) else counter.astype(np.uint64)
        state = mix((state + _GAMMA) ^ word)
    return state


def uniform(*counters: int | np.ndarray) -> np.ndarray:
    """float64 [N] in [0, 1) in steps of 2^-32, so that a sum with a number of moderate size is exact."""
    return (hash64(*counters) >> np.uint64(32)).astype(np.float64) * 2.0**-32


def hash_strings(values: pa.ChunkedArray, seed: int) -> np.ndarray:
    """uint64 [N] of strings. Fast where few lengths occur, as among ids; it is no cryptographic hash."""
    chunks = [_hash_chunk(chunk.cast(pa.large_binary()), seed) for chunk in values.chunks]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.uint64)


def hex_ids(values: pa.ChunkedArray, counter: np.ndarray) -> pa.Array:
    """string [N] of 32 hex digits, a 128-bit hash of a string and a number each."""
    halves = [hash64(hash_strings(values, seed), counter) for seed in (1, 2)]
    data = np.stack(halves, axis=1).astype(">u8").view(np.uint8).reshape(len(counter), -1)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = digits[np.stack([data >> 4, data & 15], axis=2)].reshape(len(counter), -1)
    ids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(text.shape[1]), len(text), [None, pa.py_buffer(text)])
    return ids.cast(pa.binary()).cast(pa.string())


def _hash_chunk(chunk: pa.Array, seed: int) -> np.ndarray:
    if chunk.null_count:
        raise ValueError("a missing id has no hash")
    if not len(chunk):
        return np.zeros(0, np.uint64)
    _, offsets, data = chunk.buffers()
    bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    text = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    lengths = np.diff(bounds)
    out = np.empty(len(chunk), np.uint64)
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        padded = np.zeros((len(rows), -(-length // _WORD) * _WORD), np.uint8)
        padded[:, :length] = text[bounds[rows][:, None] + np.arange(length)]
        words = padded.view("<u8")
        out[rows] = hash64(seed, length, np.zeros(len(rows), np.uint64), *words.T)
    return out
