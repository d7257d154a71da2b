"""Copies beside kernels, from the events of a trace."""

import gzip
import json

import pytest

from training.parallel.overlap import overlap, read_trace


def event(category, name, start_us, duration_us):
    return {"cat": category, "name": name, "ts": start_us, "dur": duration_us}


def test_only_time_beside_a_kernel_is_hidden():
    events = [
        event("kernel", "gemm", 0, 1000),
        event("kernel", "add", 900, 200),  # overlaps the one before: busy from 0 to 1100
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 500, 1000),  # 600 of 1000 hidden
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1100, 400),  # none hidden
        event("kernel", "attention", 2000, 100),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1950, 200),  # 100 of 200
    ]
    found = overlap(events)
    assert (found.to_host_ms, found.to_device_ms) == (1.0, 0.6)
    assert found.hidden_ms == pytest.approx(0.7)
    assert found.hidden_share == pytest.approx(0.7 / 1.6)


def test_copies_within_the_device_and_of_pageable_memory_do_not_count():
    events = [
        event("kernel", "gemm", 0, 1000),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 500),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 0, 500),
        {"cat": "cpu_op", "name": "Memcpy DtoH", "ts": 0, "dur": 10},
        {"ph": "M", "name": "process_name"},
    ]
    found = overlap(events)
    assert (found.to_host_ms, found.to_device_ms, found.hidden_ms) == (0.0, 0.0, 0.0)
    assert found.hidden_share is None


def test_traces_are_read_gzipped_or_not(tmp_path):
    raw = json.dumps({"traceEvents": [event("kernel", "gemm", 0, 1)]})
    (tmp_path / "a.json").write_text(raw)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(raw.encode()))
    assert read_trace(tmp_path / "a.json") == read_trace(tmp_path / "a.json.gz") == [event("kernel", "gemm", 0, 1)]
