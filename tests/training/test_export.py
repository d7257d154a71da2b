"""Exports: what is read is what was written, whatever is wrong is one line, and stages start from the right one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from training.export import Facts, export, warm_start
from training.recipe import Recipe, load_recipe
from waver_core.config import digest_of, load_config
from waver_core.errors import UserError
from waver_core.tensor_files import Entry, plan_shards
from waver_core.weights import INDEX, load_export, load_into

ENCODERS = {"autoencoder": "dct-1", "text": ["words-1", "pairs-1"], "features": None}


@dataclass(frozen=True)
class Config:
    """As `DiTConfig`, in small."""

    width: int = 6
    windowed: bool = False
    full_blocks: int = 8

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Network(nn.Module):
    def __init__(self, config: Config = Config(), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = config
        self.blocks = nn.ModuleList([nn.Linear(config.width, config.width) for _ in range(3)])
        self.register_buffer("seen", torch.tensor(seed, dtype=torch.int64))


def recipe(stage: str = "ct_720p") -> Recipe:
    return load_recipe(load_config(), stage)


def written(folder: Path, stage: str = "ct_720p", seed: int = 1, config: Config = Config(), **kwargs: Any) -> Network:
    """A network and its export."""
    model = Network(config, seed)
    facts = Facts(config.to_dict(), ENCODERS, step=70, weights="ema", lineage=kwargs.pop("lineage", ()))
    export(str(folder), model.state_dict(), recipe(stage), facts, **kwargs)
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert [k for k, v in a.state_dict().items() if not torch.equal(v, b.state_dict()[k])] == []


@pytest.mark.parametrize("max_shard_bytes", [1, 300, 10**9])
def test_an_export_is_plain_safetensors(tmp_path: Path, max_shard_bytes: int) -> None:
    model = written(tmp_path / "x", max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "x").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    read: dict[str, torch.Tensor] = {}
    for file in files:  # the library itself reads what was written without it
        inside = load_file(tmp_path / "x" / file)
        assert {name for name, f in index["weight_map"].items() if f == file} == set(inside)
        read.update(inside)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read.values())
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["x"]  # no temporary folders


def test_the_record_says_what_the_weights_are(tmp_path: Path) -> None:
    earlier = written_lineage(tmp_path)
    exported = load_export(str(tmp_path / "sft"))
    raw = yaml.safe_load((tmp_path / "sft" / "recipe.yaml").read_text())
    assert (raw["step"], raw["weights"], raw["encoders"], raw["model"]) == (70, "ema", ENCODERS, Config().to_dict())
    assert Recipe.model_validate(exported.recipe) == recipe("sft")
    assert [entry["stage"] for entry in exported.lineage] == ["ct_720p", "sft"]
    assert exported.lineage[0] == earlier[0]
    own = exported.lineage[1]
    assert (own["digest"], own["recipe_digest"]) == (exported.digest, digest_of(raw["recipe"]))
    exported.verify()


def written_lineage(folder: Path) -> tuple[Any, ...]:
    written(folder / "ct")
    earlier = load_export(str(folder / "ct")).lineage
    written(folder / "sft", "sft", 2, lineage=earlier)
    return earlier


def test_a_first_stage_is_recorded_too(tmp_path: Path) -> None:
    written(tmp_path / "x", "t2i_256p")  # no parent and no frame rate: fields without a value
    assert Recipe.model_validate(load_export(str(tmp_path / "x")).recipe) == recipe("t2i_256p")


def test_the_digest_depends_on_weights_alone(tmp_path: Path) -> None:
    for name, kwargs in {"a": {}, "b": {"max_shard_bytes": 1}, "c": {"seed": 2}, "d": {"dtype": torch.bfloat16}}.items():
        written(tmp_path / name, **kwargs)
    a, b, c, d = (load_export(str(tmp_path / name)).digest for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


@pytest.mark.parametrize("start", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_gives_back_every_bit(tmp_path: Path, start: str, dtype: torch.dtype | None) -> None:
    model = written(tmp_path / "x", max_shard_bytes=200)
    with torch.device(start):
        other = Network(seed=5)
    assert load_into(other, str(tmp_path / "x"), dtype=dtype) == ([], [])
    assert_same(other, model.to(dtype) if dtype else model)
    assert other.seen.dtype == torch.int64
    assert all(p.requires_grad and p.dtype == (dtype or torch.float32) for p in other.parameters())


def test_a_bf16_export_fills_an_fp32_model(tmp_path: Path) -> None:
    model = written(tmp_path / "x", dtype=torch.bfloat16)
    other = Network(seed=5)
    load_into(other, str(tmp_path / "x"))
    assert_same(other, model.to(torch.bfloat16).to(torch.float32))


def test_loading_partly(tmp_path: Path) -> None:
    model = written(tmp_path / "x")
    other = Network()
    other.head = nn.Linear(2, 2, bias=False)
    del other.blocks[2]
    names = ["blocks.2.weight", "blocks.2.bias"]
    assert load_into(other, str(tmp_path / "x"), strict=False) == (["head.weight"], names)
    assert torch.equal(other.blocks[1].weight, model.blocks[1].weight)


def mistakes(folder: Path) -> dict[str, Any]:
    """What may be wrong -> what breaks the export or returns another model, and the message."""
    shard = folder / "model-00001-of-00001.safetensors"

    def cut() -> None:
        shard.write_bytes(shard.read_bytes()[:-5])

    def renamed() -> None:
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text.replace("blocks.0.bias", "blocks.9.bias"))

    def extra() -> nn.Module:
        model = Network()
        model.head = nn.Linear(2, 2, bias=False)
        return model

    def fewer() -> nn.Module:
        model = Network()
        del model.blocks[2]
        return model

    return {
        "no record": ((folder / "recipe.yaml").unlink, "recipe.yaml is missing"),
        "no index": ((folder / INDEX).unlink, "index.json is missing"),
        "index": (lambda: (folder / INDEX).write_text("[]"), "index.json is damaged"),
        "no shard": (shard.unlink, r"00001.safetensors is missing"),
        "cut": (cut, "no safetensors file, or cut short"),
        "text": (lambda: shard.write_text("weights, honestly"), "no safetensors file"),
        "index and shard": (renamed, "lacks blocks.9.bias"),
        "record": (lambda: (folder / "recipe.yaml").write_text("version: 1"), "holds no 'model'"),
        "yaml": (lambda: (folder / "recipe.yaml").write_text("a: [1"), "cannot be read"),
        "missing name": (extra, "lacks head.weight, which the model needs"),
        "unexpected name": (fewer, "holds blocks.2.weight and 1 more, which the model lacks"),
        "shape": (lambda: Network(Config(7)), r"blocks.0.weight is \[6, 6\] in .* and \[7, 7\] in the model"),
    }


@pytest.mark.parametrize("what", list(mistakes(Path())))
def test_every_mistake_is_one_line_and_changes_nothing(tmp_path: Path, what: str) -> None:
    written(tmp_path / "x")
    act, message = mistakes(tmp_path / "x")[what]
    model = act()
    model = model if isinstance(model, nn.Module) else Network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_into(model, str(tmp_path / "x"))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_changed_weights_are_found(tmp_path: Path) -> None:
    written(tmp_path / "x")
    shard = tmp_path / "x" / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="not those that"):
        load_export(str(tmp_path / "x")).verify()


def test_an_export_is_whole_or_not_there(tmp_path: Path) -> None:
    written(tmp_path / "x")
    with pytest.raises(UserError, match="is there already"):
        written(tmp_path / "x", seed=2)

    class Broken(torch.Tensor):
        def detach(self) -> torch.Tensor:
            raise OSError("lost")

    state = {"a": torch.zeros(3), "b": torch.zeros(3).as_subclass(Broken)}
    with pytest.raises(OSError, match="lost"):
        export(str(tmp_path / "y"), state, recipe(), Facts({}, {}))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    written(tmp_path / "x", seed=2, replace=True)
    assert load_export(str(tmp_path / "x")).tensor("seen") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(UserError, match="local or mounted"):
        load_export("s3://bucket/x")


def test_a_stage_starts_from_the_one_before(tmp_path: Path) -> None:
    model = written(tmp_path / "ct")
    start = Network(seed=9)
    exported = warm_start(start, str(tmp_path / "ct"), "ct_720p", stage="sft", encoders=ENCODERS)
    assert_same(start, model)
    assert [entry["stage"] for entry in exported.lineage] == ["ct_720p"]


def test_the_refiner_starts_from_a_base_model(tmp_path: Path) -> None:
    model = written(tmp_path / "ct")
    refiner = Network(Config(windowed=True, full_blocks=4), seed=9)
    warm_start(refiner, str(tmp_path / "ct"), "ct_720p", stage="refine_1080p")
    assert_same(refiner, model)


def test_a_wrong_start_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "x", "t2v_480p")
    message = "sft starts from ct_720p, but .*x holds t2v_480p: give the export of ct_720p"
    with pytest.raises(UserError, match=message):
        warm_start(Network(), str(tmp_path / "x"), "ct_720p", stage="sft")
    warm_start(Network(), str(tmp_path / "x"), None)
    with pytest.raises(UserError, match="a model with width 6, sft trains one with 8"):
        warm_start(Network(Config(8)), str(tmp_path / "x"), None, stage="sft")
    with pytest.raises(UserError, match="trained with autoencoder dct-1, sft uses wan: encode with the same"):
        warm_start(Network(), str(tmp_path / "x"), None, stage="sft", encoders={**ENCODERS, "autoencoder": "wan"})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))))
def test_shards_hold_each_tensor_once_aligned_and_within_the_limit(sizes: list[tuple[int, torch.dtype]]) -> None:
    entries = {f"t{i}": Entry((n,), dtype) for i, (n, dtype) in enumerate(sizes)}
    shards = plan_shards(entries, 100)
    assert sorted(name for shard in shards for name in shard) == sorted(entries)
    for shard in shards:
        assert len(shard) <= 1 or sum(entries[name].bytes for name in shard) <= 100
        offset = 0
        for name in shard:
            assert offset % entries[name].dtype.itemsize == 0
            offset += entries[name].bytes
