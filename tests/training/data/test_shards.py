"""Encoded samples on disk: what is written is what is read, and what does not fit together says so in one line."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data import shards
from training.data.byte_cache import ByteCache
from training.data.shards import (
    EncodedSamples,
    Sample,
    check_fingerprints,
    describe_encoders,
    encoded_folder,
    part_schema,
    publish,
    recipe_facts,
    write_part,
)
from training.recipe import Recipe
from waver_core.errors import UserError

MakeRecipe = Callable[..., Recipe]
DIMS = (8, 4)
SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("kind", pa.string()),
        ("frames", pa.int32()),
        ("height_px", pa.int32()),
        ("width_px", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("weight", pa.float64()),
    ]
)


def _sample(k: int) -> Sample:
    rng = np.random.default_rng(k)

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float16).astype(np.float32)

    frames = 1 if k % 3 == 0 else 3
    video = frames > 1
    return Sample(
        latents=array(16, frames, 2, 4),
        last_latent=array(16, 1, 2, 4) if video else None,
        degraded=array(16, frames, 2, 4) if k % 2 else None,
        texts=[tuple(array(1 + (k + c) % 5, dim) for dim in DIMS) for c in range(2)],
        features=array(frames, 1, 2, 3) if k % 2 else None,
    )


def _row(k: int, sample: Sample) -> dict[str, Any]:
    def stored(array: np.ndarray | None) -> bytes | None:
        return None if array is None else array.astype(np.float16).tobytes()

    video = sample.latents.shape[1] > 1
    return {
        "sample_id": f"s{k}",
        "kind": "video" if video else "image",
        "frames": 9 if video else 1,
        "height_px": 16,
        "width_px": 32,
        "captions": [f"caption {k}", f"short {k}"],
        "weight": 1.0 + k,
        "content_key": f"key{k}",
        "text_tokens": 7,
        **{name: stored(getattr(sample, name)) for name in ("latents", "last_latent", "degraded", "features")},
        "features_shape": None if sample.features is None else list(sample.features.shape),
        **{f"text_{e}": [stored(text[e]) for text in sample.texts] for e in range(len(DIMS))},
    }


def _write(folder: Path, counts: tuple[int, ...] = (3, 4), encoders: dict[str, Any] | None = None, **recipe: Any) -> list[Sample]:
    """Shards of so many rows each; returns what is in them."""
    samples = [_sample(k) for k in range(sum(counts))]
    rows = [_row(k, s) for k, s in enumerate(samples)]
    schema = part_schema(SAMPLE_SCHEMA, len(DIMS))
    starts = np.cumsum([0, *counts])
    parts = [write_part(str(folder), f"u{n}", rows[a:b], schema) for n, (a, b) in enumerate(itertools.pairwise(starts))]
    names = [*SAMPLE_SCHEMA.names, "content_key", "text_tokens"]
    table = pa.Table.from_pylist(
        [{name: row[name] for name in names} for row in rows], schema=pa.schema([schema.field(n) for n in names])
    )
    table = table.append_column("shard", pa.array(np.repeat(np.arange(len(counts)), counts)))
    facts = {"encoders": encoders or {}, "dims": {"text": list(DIMS), "features": 3}, "recipe": {"stage": "t2v_480p", **recipe}}
    publish(str(folder), parts, table, {"black_16x32": np.ones((16, 1, 2, 4), np.float32)}, facts)
    return samples


def _assert_same(a: Sample, b: Sample) -> None:
    for name in ("latents", "last_latent", "degraded", "features"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, y)
    assert len(a.texts) == len(b.texts)
    for text_a, text_b in zip(a.texts, b.texts, strict=True):
        for x, y in zip(text_a, text_b, strict=True):
            np.testing.assert_array_equal(x, y)


def _change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    samples = _write(tmp_path, (3, 4, 1))
    read = EncodedSamples(str(tmp_path))
    assert len(read) == 8
    assert read.table["sample_id"].to_pylist() == [f"s{k}" for k in range(8)]
    assert "latents" not in read.table.column_names
    assert read.table.schema.field("text_tokens").type == pa.int32()
    np.testing.assert_array_equal(read.constants["black_16x32"], np.ones((16, 1, 2, 4)))
    for k in (7, 0, 3, 2, 6, 1, 5, 4, 0):
        _assert_same(read[k], samples[k])
    for row in (8, -1):
        with pytest.raises(IndexError):
            read[row]


def test_row_groups_are_small_and_only_the_one_wanted_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_GROUP_BYTES", 8000)
    samples = _write(tmp_path, (20, 30))
    footers = [pq.read_metadata(path) for path in tmp_path.glob("part-*.parquet")]
    assert all(f.row_group(g).total_byte_size < 12000 for f in footers for g in range(f.num_row_groups))
    groups: list[int] = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, g, **kw: groups.append(g) or plain(self, g, **kw))
    read = EncodedSamples(str(tmp_path))
    for k in range(50):
        _assert_same(read[k], samples[k])
    assert len(groups) == sum(f.num_row_groups for f in footers) > 4
    for k in range(50):  # all of it is in memory now
        assert read[k] is read[k]
    assert len(groups) == sum(f.num_row_groups for f in footers)


def test_a_cache_too_small_for_all_gives_the_same(tmp_path: Path) -> None:
    samples = _write(tmp_path, (5, 5))
    read = EncodedSamples(str(tmp_path), cache_bytes=1)
    for k in (0, 9, 1, 8, 0, 9):
        _assert_same(read[k], samples[k])


def test_a_reader_travels_to_another_process(tmp_path: Path) -> None:
    samples = _write(tmp_path)
    read = pickle.loads(pickle.dumps(EncodedSamples(str(tmp_path))))
    _assert_same(read[4], samples[4])


def test_a_new_set_replaces_the_old_one(tmp_path: Path) -> None:
    _write(tmp_path, (3, 4))
    before = {path.name for path in tmp_path.iterdir()}
    _write(tmp_path, (2,))
    after = {path.name for path in tmp_path.iterdir()}
    assert len(EncodedSamples(str(tmp_path))) == 2
    assert len(before) == 5 and len(after) == 4
    _write(tmp_path, (3, 4))
    assert {path.name for path in tmp_path.iterdir()} == before  # named by content


# ------------------------------------------------------------------ what does not fit together


def test_a_missing_set_names_the_command() -> None:
    with pytest.raises(UserError, match=r"no encoded samples at /nowhere: make them with `python training/encode.py --stage"):
        EncodedSamples("/nowhere")


def test_another_version_is_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    _change_index(tmp_path, lambda index: index.update(version=99))
    with pytest.raises(
        UserError, match=r"version 99, this code reads 1: encode again, `python training/encode.py --stage t2v_480p"
    ):
        EncodedSamples(str(tmp_path))


def test_a_shard_that_is_gone_is_noticed_at_the_start(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "part-u1.parquet").unlink()
    with pytest.raises(UserError, match=r"1 files of .* are missing, such as part-u1.parquet: encode again"):
        EncodedSamples(str(tmp_path))


def test_an_index_that_counts_wrong_is_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    _change_index(tmp_path, lambda index: index["shards"][0].update(rows=9))
    with pytest.raises(UserError, match="says 7 rows, its shards 13, its table 7"):
        EncodedSamples(str(tmp_path))


def test_a_shard_with_other_rows_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, (3, 4))
    write_part(str(tmp_path), "u0", [_row(k, _sample(k)) for k in range(2)], part_schema(SAMPLE_SCHEMA, 2))
    read = EncodedSamples(str(tmp_path))
    read[5]
    with pytest.raises(UserError, match=r"part-u0.parquet has 2 rows, the index says 3"):
        read[0]


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("latents", bytes(2), "1 latent values"),
        ("latents", None, "has no latents"),
        ("last_latent", bytes(2), "1 values of the last latent"),
        ("degraded", bytes(2), "1 degraded latent values"),
        ("features", bytes(2), "1 feature values"),
        ("text_1", [bytes(6), bytes(6)], "not of 4 values each"),
    ],
)
def test_arrays_of_another_shape_are_refused(tmp_path: Path, column: str, value: Any, told: str) -> None:
    _write(tmp_path, (3,))
    rows = [{**_row(k, _sample(k)), **({column: value} if k == 1 else {})} for k in range(3)]
    write_part(str(tmp_path), "u0", rows, part_schema(SAMPLE_SCHEMA, 2))
    read = EncodedSamples(str(tmp_path))
    read[0]
    with pytest.raises(UserError, match=f"sample s1.*{told}.*encode again") as caught:
        read[1]
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ fingerprints


def _index(recipe: Recipe) -> dict[str, Any]:
    return {"encoders": describe_encoders(recipe), "recipe": recipe_facts(recipe)}


@pytest.mark.parametrize("stage", ["t2v_192p_12fps", "t2v_480p", "refine_1080p"])
def test_samples_of_the_same_encoders_are_taken(encoding_recipe: MakeRecipe, stage: str) -> None:
    recipe = encoding_recipe(stage)
    check_fingerprints(json.loads(json.dumps(_index(recipe))), recipe)
    check_fingerprints(_index(recipe), encoding_recipe(stage, "training.optimizer.lr=0.1", "training.data.text_dropout=0.3"))


@pytest.mark.parametrize(
    ("stage", "override", "told"),
    [
        (
            "t2v_192p_12fps",
            "training.encoders.autoencoder={backend: dct, options: {scaling: unit}}",
            "autoencoder dct-1 scaling=root in",
        ),
        (
            "t2v_192p_12fps",
            "training.encoders.text=[{backend: hashed_words, options: {dim: 16}}]",
            "text encoder 2 .* instead of none",
        ),
        (
            "t2v_192p_12fps",
            "training.data.captions={training_caption: 1.0}",
            "caption columns training_caption, caption_short instead",
        ),
        ("t2v_480p", "training.alignment.spatial_factor=4", "feature grid 1/4 in time, 1/2 in space instead of 1/4 in time, 1/4"),
        ("refine_1080p", "training.refinement.pixel_factor=2", "pixel degradation 8.0 instead of 2.0"),
    ],
)
def test_what_differs_is_named_with_the_command(encoding_recipe: MakeRecipe, stage: str, override: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"{told}.*: encode again, `python training/encode.py --stage {stage}") as caught:
        check_fingerprints(_index(encoding_recipe(stage)), encoding_recipe(stage, override))
    assert "\n" not in str(caught.value)


def test_samples_without_features_do_not_do_for_a_stage_that_aligns(encoding_recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"feature extractor none instead of frame_statistics"):
        check_fingerprints(_index(encoding_recipe("t2v_192p_12fps")), encoding_recipe("t2v_480p"))
    check_fingerprints(_index(encoding_recipe("t2v_480p")), encoding_recipe("t2v_192p_12fps"))  # more than is needed does no harm


def test_the_folder_of_a_stage() -> None:
    assert encoded_folder("s3://bucket/run/", "sft") == "s3://bucket/run/encoded/sft"


# ------------------------------------------------------------------ the cache


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 50)), max_size=40), st.integers(1, 120))
def test_a_cache_holds_the_last_used_within_its_bytes(puts: list[tuple[int, int]], most: int) -> None:
    cache, held = ByteCache(most), dict[int, int]()
    for key, size in puts:
        held.pop(key, None)
        held[key] = size
        while sum(held.values()) > most and len(held) > 1:
            held.pop(next(iter(held)))
        cache.put(key, f"value {key}", size)
        for known in range(7):
            assert (cache.get(known) is not None) == (known in held)
        for known in held:  # looking leaves the order as it was
            cache.get(known)
