"""Averages: the arithmetic, what they refuse, what they record, and how little memory they take.

Run as a file it is the process whose memory is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from training.averaging import app, average, shares
from training.checkpoint import Checkpoints, Progress
from training.ema import Ema
from training.export import Facts, export, record_of
from training.recipe import load_recipe
from waver_core.config import load_config
from waver_core.errors import UserError
from waver_core.weights import load_export

ROOT = Path(__file__).resolve().parents[2]
FACTS = Facts({"width": 6}, {"autoencoder": "dct-1"}, step=10, weights="ema")
MEGABYTE = 1 << 20


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(40, 30, generator=generator)
    return {"a.weight": big, "a.bias": torch.randn(7, generator=generator).bfloat16(), "count": torch.tensor(3)}


def written(folder: Path, state: dict[str, torch.Tensor], stage: str = "sft", facts: Facts = FACTS, **kwargs: Any) -> str:
    export(str(folder), state, load_recipe(load_config(), stage), facts, **kwargs)
    return str(folder)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    return [written(tmp_path / f"s{i}", tensors(i), max_shard_bytes=3000) for i in range(7)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 7] * 7),
        ({"method": "weighted", "weights": [0, 0, 1, 2, 0, 5, 0]}, [0, 0, 0.125, 0.25, 0, 0.625, 0]),
        ({"method": "ema", "decay": 0.5}, [1 / 64, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]),
    ],
)
def test_the_average_is_the_weighted_mean(
    tmp_path: Path, sources: list[str], options: dict[str, Any], expected: list[float]
) -> None:
    done = average(sources, str(tmp_path / "out"), **options)
    for name in ("a.weight", "a.bias"):
        mean = sum(w * tensors(i)[name].double() for i, w in enumerate(expected))
        assert done.tensor(name).dtype == tensors(0)[name].dtype
        tolerance = 1e-6 if name == "a.weight" else 0.01
        torch.testing.assert_close(done.tensor(name).double(), mean, rtol=0, atol=tolerance)
    assert done.tensor("count") == 3
    assert [s["share"] for s in done.record["sources"]] == pytest.approx(expected)


def test_the_average_is_taken_in_fp32(tmp_path: Path, sources: list[str]) -> None:
    bias = average(sources, str(tmp_path / "out"), dtype=torch.float32).tensor("a.bias")
    mean = sum(tensors(i)["a.bias"].double() for i in range(7)) / 7
    torch.testing.assert_close(bias.double(), mean, rtol=0, atol=1e-7)


def test_the_average_of_equal_weights_is_these_weights(tmp_path: Path) -> None:
    state = tensors(0)
    folders = [written(tmp_path / f"s{i}", {**state, "other": torch.tensor([float(i)])}) for i in range(9)]
    done = average(folders, str(tmp_path / "out"))
    assert torch.equal(done.tensor("a.weight"), state["a.weight"])
    assert torch.equal(done.tensor("a.bias"), state["a.bias"])
    assert done.tensor("other") == 4


def test_the_record_lists_the_sources(tmp_path: Path, sources: list[str]) -> None:
    done = average([*sources[:2], written(tmp_path / "ct", tensors(9), "ct_720p")], str(tmp_path / "out"), method="ema")
    assert done.record["weights"] == "average"
    assert done.record["averaging"] == {"method": "ema", "decay": 0.8}
    assert [s["digest"] for s in done.record["sources"]][:2] == [load_export(s).digest for s in sources[:2]]
    assert [s["stage"] for s in done.record["sources"]] == ["sft", "sft", "ct_720p"]
    assert done.stage == "ct_720p"  # the last one's
    assert [(e["stage"], e["weights"]) for e in done.lineage] == [("ct_720p", "average")]
    again = average([str(tmp_path / "out"), *sources[2:4]], str(tmp_path / "again"))  # an average is an export
    assert again.record["sources"][0]["weights"] == "average"


@given(st.integers(2, 12), st.floats(0.01, 0.99))
def test_shares_sum_to_one(count: int, decay: float) -> None:
    for parts in (shares("simple", count), shares("ema", count, decay=decay), shares("weighted", count, range(1, count + 1))):
        assert len(parts) == count
        assert sum(parts) == pytest.approx(1)
        assert min(parts) > 0


def test_ema_shares_are_those_of_a_moving_average() -> None:
    mean = 5.0
    for value in (1.0, 7.0, 2.0):
        mean = 0.7 * mean + 0.3 * value
    assert sum(p * v for p, v in zip(shares("ema", 4, decay=0.7), (5.0, 1.0, 7.0, 2.0), strict=True)) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "median"}, "no method 'median'"),
        ({"method": "weighted"}, "--weights belongs to"),
        ({"weights": [1] * 7}, "--weights belongs to"),
        ({"method": "weighted", "weights": [1, 2]}, "2 weights for 7 sources"),
        ({"method": "weighted", "weights": [0] * 7}, "not all 0"),
        ({"method": "weighted", "weights": [-1] + [1] * 6}, "0 or more"),
        ({"method": "ema", "decay": 1.0}, "--decay lies between"),
    ],
)
def test_wrong_options_are_one_line(sources: list[str], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        average(sources, str(tmp_path / "out"), **options)


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "first", tensors(0))
    state = tensors(1)
    others = {
        r"a.weight is \[40, 30\] and \[30, 40\]": written(tmp_path / "shape", {**state, "a.weight": state["a.weight"].T}),
        "first lacks b": written(tmp_path / "more", {**state, "b": torch.zeros(1)}),
        "fewer lacks count": written(tmp_path / "fewer", {k: v for k, v in state.items() if k != "count"}),
        "model.width is 6 and 7": written(tmp_path / "model", state, facts=Facts({"width": 7}, FACTS.encoders)),
        "encoders.autoencoder is dct-1 and wan": written(
            tmp_path / "encoders", state, facts=Facts(FACTS.model, {"autoencoder": "wan"})
        ),
        "count is not a floating-point tensor and differs": written(tmp_path / "count", {**state, "count": torch.tensor(4)}),
        "same weights": written(tmp_path / "twin", tensors(0)),
        "recipe.yaml is missing": str(tmp_path / "nothing"),
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=message) as caught:
            average([first, other], str(tmp_path / "out"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="two or more"):
        average([first], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_step_folders_are_sources(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ema = Ema(model, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    record = record_of(load_recipe(load_config(), "sft"), Facts(FACTS.model, FACTS.encoders, lineage=({"stage": "ct_720p"},)))
    checkpoints = Checkpoints(str(tmp_path / "run"), keep=5, every=1, record=record)
    averaged, raw = [], []
    for step in range(1, 4):
        optimizer.zero_grad()
        model.eval()(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        ema.update(model, step)
        checkpoints.save(Progress(step), model, ema, optimizer)
        raw.append(model[0].weight.detach().clone())
        averaged.append(ema.state_dict()["0.weight"].clone())
    checkpoints.finish()
    folders = sorted(str(p) for p in (tmp_path / "run").glob("step-*"))
    for take, values in (("ema", averaged), ("raw", raw)):
        done = average(folders, str(tmp_path / take), take=take)  # type: ignore[arg-type]
        torch.testing.assert_close(done.tensor("0.weight"), torch.stack(values).mean(0))
        assert set(done.files) == set(model.state_dict())  # with the buffers, which have no average of their own
        assert [(s["step"], s["weights"]) for s in done.record["sources"]] == [(1, take), (2, take), (3, take)]
        assert [e["stage"] for e in done.lineage] == ["ct_720p", "sft"]
        assert done.record["step"] == 3
    mixed = average([str(tmp_path / "ema"), folders[2]], str(tmp_path / "mixed"))
    torch.testing.assert_close(mixed.tensor("0.weight"), (torch.stack(averaged).mean(0) + averaged[2]) / 2)

    checkpoints.save(Progress(9), model)
    checkpoints.finish()
    with pytest.raises(UserError, match="no averaged weights: say --take raw"):
        average([folders[0], str(tmp_path / "run" / "step-00000009")], str(tmp_path / "x"))
    (Path(folders[0]) / "complete.json").unlink()
    with pytest.raises(UserError, match="checkpoint of a running stage"):
        average(folders, str(tmp_path / "x"))


def test_the_command_line(tmp_path: Path, sources: list[str]) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["--output", str(tmp_path / "out"), *sources], catch_exceptions=False)
    assert result.exit_code == 0
    assert "warning" not in result.output
    assert "0.1429" in result.output
    options = ["--output", str(tmp_path / "few"), "--method", "weighted", "--weights", "1,3", "--dtype", "bfloat16", *sources[:2]]
    result = runner.invoke(app, options, catch_exceptions=False)
    assert "warning: 2 sources; the report found 7 to 10" in result.output
    assert load_export(str(tmp_path / "few")).tensor("a.weight").dtype == torch.bfloat16
    for wrong in (["--weights", "1,x"], ["--dtype", "float8"], ["--take", "best"], ["--method", "mean"]):
        with pytest.raises(UserError, match=wrong[1]):
            runner.invoke(app, ["--output", str(tmp_path / "no"), *wrong, *sources], catch_exceptions=False)


def test_the_entry_script_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "training/averaging.py", "--output", str(tmp_path / "out"), str(tmp_path), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[1:] == [f"error: {tmp_path} is no export: recipe.yaml is missing"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_below_three_shards(tmp_path: Path, dtype: torch.dtype) -> None:
    """Seven models of four shards of 32 MB each: all of them together would be 900 MB."""
    shard = 32 * MEGABYTE
    rows = shard // dtype.itemsize // 4 // 1024
    for i in range(7):
        state = {f"blocks.{n}.weight": torch.full((rows, 1024), float(i + n), dtype=dtype) for n in range(16)}
        written(tmp_path / f"s{i}", state, max_shard_bytes=shard)
        written(tmp_path / f"t{i}", {"small": torch.tensor([float(i)])})
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert int(result.stdout) < 3 * shard, f"{int(result.stdout) / MEGABYTE:.0f} MB"
    assert load_export(str(tmp_path / "average")).tensor("blocks.3.weight")[5, 5] == 6


def _measured(folder: str) -> int:
    """Bytes by which the process grows at most."""
    average([f"{folder}/t{i}" for i in range(7)], f"{folder}/warm")  # what the first call loads is not counted
    before = _peak()
    average([f"{folder}/s{i}" for i in range(7)], f"{folder}/average")
    return _peak() - before


def _peak() -> int:
    """Most resident memory so far. Not `ru_maxrss`: that starts with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    print(_measured(sys.argv[1]))
