"""Resume is exact, at one worker and at another number of them; a killed write does not count; errors are loud.

Run as a file it is a worker of the tests below: training with `fully_shard` over gloo, or a run that is killed in mid-write.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from training.checkpoint import Checkpoints, Progress, completed, latest, read_complete
from training.ema import Ema
from training.export import Facts, export
from training.recipe import load_recipe
from waver_core.config import load_config
from waver_core.errors import RunFailed, UserError
from waver_core.weights import load_export, load_into


class Network(nn.Module):
    """Uneven sizes, a parameter of one number, one that gets no gradient, and a buffer."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 1)])
        self.scale = nn.Parameter(torch.ones(1))
        self.idle = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * self.scale


class Run:
    """A training run in small: AdamW in two groups, an average, data that follow from the step."""

    def __init__(self, width: int = 7, shard: bool = False) -> None:
        torch.manual_seed(width)
        self.model = Network(width)
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.ema = Ema(self.model, 0.99)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
        self.step = 0

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.step += 1
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-2 / self.step**0.5
            x = torch.randn(16, 5, generator=torch.Generator().manual_seed(self.step))
            self.optimizer.zero_grad(set_to_none=True)
            (self.model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
            self.model.seen += 16
            self.ema.update(self.model, self.step)
        return self

    def save(self, checkpoints: Checkpoints) -> None:
        checkpoints.save(self.progress(), self.model, self.ema, self.optimizer)

    def progress(self) -> Progress:
        guard = {"norms": [0.1, 1e-300, float("inf")], "skipped": 2}
        return Progress(self.step, 1, self.step % 5, 16 * self.step, 99 * self.step, {"minutes": 0.1 + 0.2}, guard)

    def restore(self, checkpoints: Checkpoints) -> Progress | None:
        progress = checkpoints.restore(self.model, self.ema, self.optimizer)
        self.step = progress.step if progress else 0
        return progress

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that decides how the run goes on, gathered from all workers."""
        parts: dict[str, Any] = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        parts.update({f"ema.{k}": v for k, v in self.ema.state_dict().items()})
        for name, p in self.model.named_parameters():
            parts.update({f"optimizer.{name}.{k}": v for k, v in self.optimizer.state.get(p, {}).items()})
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in parts.items()}
        rates = {
            f"group.{i}.{k}": torch.tensor(g[k])
            for i, g in enumerate(self.optimizer.param_groups)
            for k in ("lr", "weight_decay")
        }
        return {k: v.detach().clone() for k, v in whole.items()} | rates


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = Run().train(9)
    first = Run().train(4)
    checkpoints = Checkpoints(str(tmp_path), keep=2, every=4)
    first.save(checkpoints)
    first.train(3)  # goes on while the state of step 4 is being written, and is then lost
    checkpoints.finish()

    again = Run(7)
    with torch.no_grad():  # whatever is there before, is gone after
        for p in again.model.parameters():
            p.normal_()
    again.train(1)
    assert again.restore(Checkpoints(str(tmp_path), keep=2, every=4)) == Run().train(4).progress()
    assert_same(again.state(), Run().train(4).state())
    assert again.optimizer.state.keys() == {p for n, p in again.model.named_parameters() if n != "idle"}
    assert_same(again.train(5).state(), undisturbed.state())


def test_a_run_without_checkpoints_starts_from_nothing(tmp_path: Path) -> None:
    run = Run()
    assert run.restore(Checkpoints(str(tmp_path / "none"), keep=1, every=1)) is None
    assert latest(str(tmp_path / "none")) is None


def test_a_checkpoint_before_the_first_step_leaves_the_optimiser_alone(tmp_path: Path) -> None:
    run = Run()
    checkpoints = Checkpoints(str(tmp_path), keep=1, every=1)
    run.save(checkpoints)
    checkpoints.finish()
    assert not run.optimizer.state
    again = Run().train(2)
    assert again.restore(Checkpoints(str(tmp_path), keep=1, every=1)) is not None
    assert_same(again.train(3).state(), Run().train(3).state())


def test_the_newest_are_kept_and_a_saved_step_is_not_written_twice(tmp_path: Path) -> None:
    run = Run()
    checkpoints = Checkpoints(str(tmp_path), keep=2, every=2, record={"recipe": {"stage": "sft"}})
    for _ in range(8):
        run.train(1)
        if checkpoints.due(run.step):
            run.save(checkpoints)
    run.save(checkpoints)  # step 8 again, at the end of the stage
    checkpoints.finish()
    assert [Path(p).name for p in completed(str(tmp_path))] == ["step-00000006", "step-00000008"]
    assert sorted(os.listdir(tmp_path)) == ["step-00000006", "step-00000008"]
    assert (tmp_path / "step-00000008" / "recipe.yaml").read_text().splitlines()[-1] == "step: 8"
    assert read_complete(latest(str(tmp_path)) or "")["progress"]["samples_seen"] == 128


def test_another_runs_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2, every=2)
    Run().train(2).save(checkpoints)
    checkpoints.finish()
    with pytest.raises(UserError, match="another run: restore it first"):
        Run().train(2).save(Checkpoints(str(tmp_path), keep=2, every=2))


def test_other_shapes_and_names_are_one_line(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2, every=2)
    run = Run().train(2)
    checkpoints.save(run.progress(), run.model)
    checkpoints.finish()
    wide, other = Run(8), Run()
    with pytest.raises(UserError, match=r"layers.0.weight is \[7, 5\] in .*step-00000002 and \[8, 5\] in the model") as caught:
        checkpoints.restore(wide.model)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no averaged weights"):
        checkpoints.restore(other.model, other.ema)
    other.model.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="has no parameter extra"):
        checkpoints.restore(other.model)
    del other.model.extra, other.model.idle
    with pytest.raises(UserError, match="holds parameter idle"):
        checkpoints.restore(other.model)


def test_another_optimiser_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2, every=2)
    Run().train(2).save(checkpoints)
    checkpoints.finish()
    run = Run()
    with pytest.raises(UserError, match="another optimiser"):
        checkpoints.restore(run.model, run.ema, torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize("damage", ["shard", "cut", "json"])
def test_a_damaged_checkpoint_is_one_line_that_names_the_folder(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2, every=2)
    Run().train(2).save(checkpoints)
    checkpoints.finish()
    (shard,) = tmp_path.glob("step-*/*.distcp")
    if damage == "shard":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:500])
    else:
        (shard.parent / "complete.json").write_text('{"progress": {}}')
    run = Run()
    with pytest.raises(UserError, match=r"step-00000002.*(cannot be read|is damaged).*delete") as caught:
        run.restore(Checkpoints(str(tmp_path), keep=2, every=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("when", ["save", "finish"])
def test_an_error_of_the_background_write_is_raised(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, checkpoints = Run().train(2), Checkpoints(str(tmp_path), keep=2, every=2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    run.save(checkpoints)
    run.train(2)
    with pytest.raises(RunFailed, match=r"step-00000002 was not written: OSError: .*No space left"):
        run.save(checkpoints) if when == "save" else checkpoints.finish()
    assert latest(str(tmp_path)) is None


def test_a_worker_with_a_disk_of_its_own_is_noticed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), keep=2, every=2)
    with pytest.raises(UserError, match=r"__1_0.distcp of another worker is not there"):
        checkpoints._finish(str(tmp_path), {"__1_0.distcp"}, {})


def test_checkpoints_on_another_file_system(tmp_path: Path) -> None:
    folder = f"memory://{tmp_path.name}/checkpoints"
    checkpoints = Checkpoints(folder, keep=1, every=2)
    run = Run().train(2)
    run.save(checkpoints)
    run.train(2).save(checkpoints)
    checkpoints.finish()
    assert completed(folder) == [f"{folder}/step-00000004"]
    again = Run()
    assert again.restore(Checkpoints(folder, keep=1, every=2)) == run.progress()
    assert_same(again.state(), run.state())


def test_a_run_killed_in_mid_write_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    process = _start("killed", tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    half = tmp_path / "step-00000004"
    assert half.exists()
    assert not (half / "complete.json").exists()
    assert Path(latest(str(tmp_path)) or "").name == "step-00000002"
    again = Run()
    assert again.restore(Checkpoints(str(tmp_path), keep=2, every=2)) == Run().train(2).progress()
    assert not half.exists()
    assert_same(again.train(4).state(), Run().train(6).state())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_with_sharded_weights(tmp_path: Path) -> None:
    """What two workers wrote is read by two and by one, what one wrote by two; `_sharded` checks swaps and exports too."""
    alone = Checkpoints(str(tmp_path / "one"), keep=2, every=2)
    run = Run().train(3)
    run.save(alone)
    alone.finish()
    torch.save(run.state(), tmp_path / "one.pt")
    workers = [_start("sharded", tmp_path, rank) for rank in range(2)]
    outcomes = [worker.communicate(timeout=250)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outcomes
    again = Run()
    assert again.restore(Checkpoints(str(tmp_path / "two"), keep=3, every=2)) is not None
    assert_same(again.state(), torch.load(tmp_path / "two.pt"))


def _start(part: str, folder: Path, rank: int = 0) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, part, str(folder), str(rank)]
    stderr = subprocess.STDOUT if part == "sharded" else None
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)


def _killed(folder: str) -> None:
    """Step 2 is written; of step 4 one tensor is on disk when this says so and waits."""
    import time

    from torch.distributed.checkpoint import filesystem

    checkpoints = Checkpoints(folder, keep=2, every=2)
    run = Run().train(2)
    run.save(checkpoints)
    checkpoints.finish()
    write = filesystem._write_item

    def slowly(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        args[1].flush()
        print("writing", flush=True)
        time.sleep(60)
        return result

    filesystem._write_item = slowly
    run.train(2).save(checkpoints)
    checkpoints.finish()


def _sharded(folder: str, rank: int) -> None:
    """One of two workers."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run = Run(shard=True)
    checkpoints = Checkpoints(f"{folder}/two", keep=3, every=2)
    run.train(4).save(checkpoints)
    run.train(2).save(checkpoints)  # step 4 is awaited, then step 6 is written
    state = run.state()
    run.train(1)
    checkpoints.finish()
    if rank == 0:
        torch.save(state, f"{folder}/two.pt")
    after = run.train(2).state()

    again = Run(shard=True).train(1)
    assert again.restore(Checkpoints(f"{folder}/two", keep=3, every=2)) is not None
    assert again.step == 6
    assert_same(again.state(), state)
    assert_same(again.train(3).state(), after)

    smaller = Run(shard=True)  # two workers read what one has written
    assert smaller.restore(Checkpoints(f"{folder}/one", keep=3, every=2)) is not None
    assert_same(smaller.state(), torch.load(f"{folder}/one.pt"))

    # A forward without a backward leaves gathered weights in the root module; a swap must not compute with those.
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = run.model(x)
        with run.ema.swapped(run.model):
            averaged = run.model(x)
            plain = Network()
            whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in run.model.state_dict().items()}
            plain.load_state_dict(whole)
            torch.testing.assert_close(averaged, plain(x))
        assert not torch.equal(averaged, raw)
        assert torch.equal(run.model(x), raw)

    facts = Facts(model={}, encoders={}, step=8, weights="raw")
    whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in run.model.state_dict().items()}
    digest = export(f"{folder}/export", run.model.state_dict(), load_recipe(load_config(), "sft"), facts, max_shard_bytes=99)
    exported = load_export(f"{folder}/export")
    assert digest == exported.digest
    assert_same({k: exported.tensor(k) for k in exported.files}, whole)
    fresh = Run(shard=True)
    load_into(fresh.model, f"{folder}/export")
    assert_same({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in fresh.model.state_dict().items()}, whole)
    assert torch.equal(fresh.model(x), run.model(x))
    with pytest.raises(UserError, match="is there already"):  # found by one worker, raised on both
        export(f"{folder}/export", run.model.state_dict(), load_recipe(load_config(), "sft"), facts)

    wide = Run(8, shard=True)  # an error is one for all workers, and nobody hangs
    with pytest.raises(UserError, match=r"layers.0.weight"):
        wide.restore(Checkpoints(f"{folder}/two", keep=3, every=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        _killed(sys.argv[2])
    else:
        _sharded(sys.argv[2], int(sys.argv[3]))
        print(json.dumps({"rank": int(sys.argv[3])}))
