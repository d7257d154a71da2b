"""Hashes of counters and strings: reference values, independence of layout, and no visible pattern."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from training.data.counter_hash import hash64, hash_strings, hex_ids, mix, uniform


def test_mix_is_the_output_function_of_splitmix64() -> None:
    state = np.array([0x9E3779B97F4A7C15], np.uint64)  # the generator's first step from seed 0
    assert mix(state).tolist() == [0xE220A8397B1DCDAF]


def test_counters_matter_and_so_does_their_order() -> None:
    rows = np.arange(1000)
    hashes = [hash64(0, 1, rows), hash64(1, 0, rows), hash64(0, rows + 2, 1), hash64(0, 0, rows), hash64(-1, 0, rows)]
    assert len(np.unique(np.concatenate(hashes))) == 5000
    assert hash64(0, 1, rows)[7] == hash64(0, 1, 7)[0]


def test_uniform_fills_the_interval_evenly_without_correlation() -> None:
    a, b = uniform(3, 0, np.arange(100_000)), uniform(3, 1, np.arange(100_000))
    assert a.min() >= 0 and a.max() < 1
    assert np.histogram(a, 10, (0, 1))[0] == pytest.approx(10_000, rel=0.05)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.02


def test_hashes_of_strings_do_not_depend_on_chunks_or_neighbours() -> None:
    words = ["", "a", "aa", "a\0", "0123456789abcdef", "é", "b" * 37]
    whole = hash_strings(pa.chunked_array([words]), 1)
    parts = hash_strings(pa.chunked_array([words[:3], words[3:]]), 1)
    sliced = hash_strings(pa.chunked_array([pa.array(["x", *words]).slice(1)]), 1)
    large = hash_strings(pa.chunked_array([words], pa.large_string()), 1)
    assert whole.tolist() == parts.tolist() == sliced.tolist() == large.tolist()
    assert len(set(whole.tolist())) == len(words)
    assert not set(whole.tolist()) & set(hash_strings(pa.chunked_array([words]), 2).tolist())
    assert len(hash_strings(pa.chunked_array([], pa.string()), 1)) == 0
    with pytest.raises(ValueError):
        hash_strings(pa.chunked_array([["a", None]]), 1)


def test_ids_are_hex_and_differ_by_string_and_counter() -> None:
    ids = hex_ids(pa.chunked_array([["a", "a", "b"]]), np.array([0, 1, 0])).to_pylist()
    assert len(set(ids)) == 3
    assert all(len(i) == 32 and set(i) <= set("0123456789abcdef") for i in ids)
    assert ids[1] == hex_ids(pa.chunked_array([["a"]]), np.array([1])).to_pylist()[0]
