"""The loop of a stage: learns, resumes exactly, does not depend on workers or packing, and stops loudly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoint import latest, read_complete
from training.encode import Resources, encode
from training.group import Worker
from training.job import Job
from training.loop import train
from training.parallel import apply
from training.parallel.compiling import compile_block
from training.recipe import Recipe
from training.trackers import read_metrics
from waver_core.errors import RunFailed, UserError
from waver_core.weights import load_export

ROOT = Path(__file__).resolve().parents[2]
MakeRecipe = Callable[..., Recipe]
SMALL = (
    "training.model={preset: tiny, overrides: {dual_blocks: 1, single_blocks: 1, heads: 2, head_dim: 16}}",
    "training.data.held_out_share=0",
    "training.data.max_per_pack=2",
    "training.data.text_dropout=0.2",
    "training.optimizer.warmup_steps=2",
    "training.schedule={max_steps: 8, checkpoint_every_steps: 3, log_every_steps: 1, validate_every_steps: 4, trackers: []}",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(encoding_recipe: MakeRecipe) -> MakeRecipe:
    """`make(stage, *overrides)`: a recipe of a model of two narrow blocks."""
    return lambda stage="t2v_192p_12fps", *sets: encoding_recipe(stage, *SMALL, *sets)


@pytest.fixture(scope="module")
def samples(encoding_recipe: MakeRecipe, curated: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's folder with the samples of three stages encoded."""
    from waver_core.command_line import new_console

    run = tmp_path_factory.mktemp("run")
    for stage in ("t2v_192p_12fps", "t2v_480p", "refine_1080p"):
        encode(encoding_recipe(stage, *SMALL), [curated], str(run), new_console(), Resources(serial=True))
    return str(run)


def _job(recipe: Recipe, samples: str, output: Path, parent: str | None = None) -> Job:
    return Job(recipe, str(output), f"{samples}/encoded/{recipe.stage}", parent=parent)


def _losses(job: Job) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(job.folder) if "loss" in line]


def _trained(job: Job, worker: Worker | None = None) -> list[tuple[int, float]]:
    train(job, worker or Worker(), lambda news: None)
    return _losses(job)


def test_a_stage_learns_and_exports(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    sets = ("training.schedule.max_steps=40", "training.stages.t2v_192p_12fps.lr=5.0e-3")
    job = _job(make("t2v_192p_12fps", *sets), samples, tmp_path)
    told: list[dict[str, Any]] = []
    summary = train(job, Worker(), told.append)
    losses = [loss for _, loss in _losses(job)]
    assert len(losses) == summary["steps"] == 40
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    exported = load_export(str(job.export_folder))
    assert (exported.stage, exported.digest, exported.record["weights"]) == (job.recipe.stage, summary["digest"], "ema")
    assert [entry["stage"] for entry in exported.lineage] == ["t2v_192p_12fps"]
    assert told[-1]["step"] == 40
    exported.verify()


def test_the_same_run_twice_is_the_same_bit_for_bit(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    first, second = (_job(make(), samples, tmp_path / name) for name in "ab")
    assert _trained(first) == _trained(second)
    assert load_export(str(first.export_folder)).digest == load_export(str(second.export_folder)).digest


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [2, 3, 5])
def test_a_stopped_run_goes_on_bit_for_bit(make: MakeRecipe, samples: str, tmp_path: Path, after: int) -> None:
    whole, cut = (_job(make(), samples, tmp_path / name) for name in "ab")
    expected = _trained(whole)

    def stop(news: dict[str, Any]) -> None:
        if news["step"] == after and "loss" in news:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        train(cut, Worker(), stop)
    assert _trained(cut) == expected
    assert load_export(str(cut.export_folder)).digest == load_export(str(whole.export_folder)).digest
    reported = [{k: v for k, v in line.items() if k.startswith("flow/")} for line in read_metrics(cut.folder)]
    assert reported == [{k: v for k, v in line.items() if k.startswith("flow/")} for line in read_metrics(whole.folder)]


_CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import json, pickle, torch
torch.set_num_threads(1)
from training.group import Worker
from training.loop import train
job = pickle.loads(bytes.fromhex(sys.argv[2]))
train(job, Worker(), lambda news: print(json.dumps(news), flush=True))
"""


def _child(job: Job) -> subprocess.Popen[str]:
    import pickle

    command = [sys.executable, "-c", _CHILD, str(ROOT), pickle.dumps(job).hex()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_sigkill_in_mid_step_leaves_the_curve_of_an_undisturbed_run(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    sets = ("training.schedule.max_steps=12",)
    whole, killed = (_job(make("t2v_192p_12fps", *sets), samples, tmp_path / name) for name in "ab")
    expected = _trained(whole)
    process = _child(killed)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["step"] >= 7:
            time.sleep(0.01)  # somewhere within the next step
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert not killed.export_folder.exists()
    again = _child(killed)
    printed, _ = again.communicate(timeout=90)
    assert again.returncode == 0
    steps = [json.loads(line)["step"] for line in printed.splitlines()]
    assert 3 < steps[0] <= 8, "it went on from a checkpoint, not from the start"
    assert _losses(killed) == expected
    assert load_export(str(killed.export_folder)).digest == load_export(str(whole.export_folder)).digest


_WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import pickle, torch, torch.distributed as dist
torch.set_num_threads(1)
from training.group import Worker
from training.loop import train
job, rank, world, rendezvous = pickle.loads(bytes.fromhex(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
train(job, Worker(rank, world), lambda news: None)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["t2v_192p_12fps", "t2v_480p"])
def test_two_workers_have_the_losses_of_one(make: MakeRecipe, samples: str, tmp_path: Path, stage: str) -> None:
    """Three micro-batches a step for two workers: one of them has less to do, and sharded weights must not mind."""
    import pickle

    sets = ("training.data.micro_batches_per_step=3", "training.schedule.max_steps=5")
    alone, shared = (_job(make(stage, *sets), samples, tmp_path / name) for name in "ab")
    expected = _trained(alone)
    commands = [
        [sys.executable, "-c", _WORKER, str(ROOT), pickle.dumps(shared).hex(), str(r), "2", str(tmp_path / "meet")]
        for r in range(2)
    ]
    processes = [subprocess.Popen(c, env={**os.environ, "OMP_NUM_THREADS": "1"}) for c in commands]
    assert [p.wait(timeout=100) for p in processes] == [0, 0]
    found = _losses(shared)
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    held_out = [[line for line in read_metrics(j.folder) if "held_out/loss" in line] for j in (alone, shared)]
    assert held_out[0] == held_out[1] == []  # nothing is held out of eight clips here


def test_what_saves_memory_and_time_leaves_the_losses(
    make: MakeRecipe, samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, computed again, waiting in host memory; what is given up is said, and what compiling took."""
    told: list[str] = []
    monkeypatch.setattr(apply, "compile_block", partial(compile_block, backend="aot_eager"))
    saving = "training.parallel={compile: true, checkpointing: selective, offload: all}"
    plain, spread = (
        _job(make("t2v_192p_12fps", *sets), samples, tmp_path / name) for name, sets in (("a", ()), ("b", (saving,)))
    )
    expected = _trained(plain)
    train(spread, Worker(), lambda news: told.append(news.get("warning", "")))
    for (step, loss), (_, wanted) in zip(_losses(spread), expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5), step
    said = " ".join(told)
    assert "keep" in said and "in host memory" in said and "blocks are compiled: " in said
    assert read_metrics(spread.folder)[0]["compiled/graphs"] >= 1


def test_packed_samples_have_the_losses_of_those_alone(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    """One sample a micro-batch, or all samples of a kind in one: the same mean, up to rounding."""
    sets = ("training.data.micro_batches_per_step=8", "training.schedule.max_steps=3", "training.data.text_multiple=1")
    alone = _job(make("t2v_192p_12fps", *sets, "training.data.max_per_pack=1"), samples, tmp_path / "a")
    packed = _job(
        make("t2v_192p_12fps", *sets, "training.data.max_per_pack=8", "training.data.packing=spfhp"), samples, tmp_path / "b"
    )
    first, second = dict(_trained(alone)), dict(_trained(packed))
    assert second[1] == pytest.approx(first[1], rel=1e-5)


def test_encoding_on_the_fly_gives_the_losses_of_encoded_samples(
    make: MakeRecipe, samples: str, curated: str, tmp_path: Path
) -> None:
    recipe = make("t2v_192p_12fps", "training.schedule.max_steps=3")
    stored = _trained(_job(recipe, samples, tmp_path / "a"))
    assert _trained(Job(recipe, str(tmp_path / "b"), None, (curated,))) == stored


def test_alignment_and_image_to_video_after_a_parent(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    sets = ("training.stages.t2v_480p.after=t2v_192p_12fps", "training.schedule.max_steps=3")
    parent = _job(make("t2v_192p_12fps", *sets), samples, tmp_path)
    _trained(parent)
    child = _job(make("t2v_480p", *sets), samples, tmp_path, str(parent.export_folder))
    losses = _trained(child)
    aligned = [line["alignment"] for line in read_metrics(child.folder) if "alignment" in line]
    assert len(losses) == len(aligned) == 3
    assert all(-1 <= value <= 1 for value in aligned)
    assert [entry["stage"] for entry in load_export(str(child.export_folder)).lineage] == ["t2v_192p_12fps", "t2v_480p"]
    assert not any(name.startswith("alignment") for name in load_export(str(child.export_folder)).entries)


def test_the_refiner_starts_from_a_base_and_draws_what_it_mends(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    sets = (
        "training.stages.refine_1080p.after=t2v_192p_12fps",
        "training.stages.refine_1080p.video=tiny",
        "training.stages.refine_1080p.image=tiny",
        "training.schedule.max_steps=3",
        "training.sampling.every_steps=3",
        "training.sampling.steps=2",
    )
    parent = _job(make("t2v_192p_12fps", *sets), samples, tmp_path)
    _trained(parent)
    child = _job(make("refine_1080p", *sets), samples, tmp_path, str(parent.export_folder))
    assert len(_trained(child)) == 3
    assert load_export(str(child.export_folder)).model["windowed"] is True
    assert {p.suffix for p in (child.folder / "samples" / "step-00000003").iterdir()} >= {".mp4", ".jpg"}


def test_previews_and_the_loss_curve_are_written(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    sets = (
        "training.schedule.max_steps=2",
        "training.sampling={every_steps: 2, prompts: [A red disc., A blue disc.], seconds: 2.25, steps: 2}",
    )
    job = _job(make("t2v_192p_12fps", *sets), samples, tmp_path)
    _trained(job)
    made = sorted(p.name for p in (job.folder / "samples" / "step-00000002").iterdir())
    assert made == ["00.mp4", "01.mp4", "prompts.txt", "sheet.jpg"]
    assert (job.folder / "loss.png").stat().st_size > 5_000


def test_held_out_sources_are_measured_at_fixed_timesteps(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    recipe = make("t2v_192p_12fps", "training.schedule.max_steps=4", "training.data.held_out_share=0.4")
    run = tmp_path / "own"
    from waver_core.command_line import new_console

    curated_folder = json.loads((Path(samples) / "encoded" / "t2v_192p_12fps" / "index.json").read_text())["curated"]
    encode(recipe, curated_folder, str(run), new_console(), Resources(serial=True))
    job = Job(recipe, str(run), f"{run}/encoded/{recipe.stage}")
    _trained(job)
    found = [line for line in read_metrics(job.folder) if "held_out/loss" in line]
    assert [line["step"] for line in found] == [4]
    assert {"held_out/t0.1", "held_out/t0.5", "held_out/t0.9"} <= set(found[0])


def test_a_nan_stops_the_run_and_the_last_checkpoint_stays(
    make: MakeRecipe, samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(make(), samples, tmp_path)
    from training import loop

    real, calls = loop._Run._step, []

    def poisoned(run: Any, step: int, *rest: Any) -> Any:
        calls.append(step)
        if step == 5:
            with torch.no_grad():
                next(run.trainee.parameters()).fill_(float("nan"))
        return real(run, step, *rest)

    monkeypatch.setattr(loop._Run, "_step", poisoned)
    with pytest.raises(RunFailed, match=r"step 5: loss nan"):
        train(job, Worker(), lambda news: None)
    monkeypatch.setattr(loop._Run, "_step", real)
    assert _trained(job)[-1][0] == 8


def test_time_may_end_a_stage_before_its_steps(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    sets = ("training.schedule.max_steps=100000", "training.schedule.max_minutes=0.01", "training.optimizer.cooldown_share=0.5")
    job = _job(make("t2v_192p_12fps", *sets), samples, tmp_path)
    steps = train(job, Worker(), lambda news: None)["steps"]
    assert 1 <= steps < 100000
    rates = [line["lr"] for line in read_metrics(job.folder) if "lr" in line]
    assert rates[-1] < max(rates) or steps < 5


def test_samples_of_other_encoders_are_refused(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    recipe = make("t2v_192p_12fps", "training.encoders.autoencoder={backend: dct, options: {scaling: unit}}")
    with pytest.raises(UserError, match="encoded with autoencoder"):
        _trained(_job(recipe, samples, tmp_path))


def test_other_samples_than_those_it_began_with_are_refused(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    job = _job(make("t2v_192p_12fps", "training.schedule.max_steps=4"), samples, tmp_path / "run")
    _trained(job)
    other = tmp_path / "encoded"
    shutil.copytree(f"{samples}/encoded/t2v_192p_12fps", other)
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps({**index, "sample_digest": "another"}))
    with pytest.raises(UserError, match="the samples have changed since step 4 of t2v_192p_12fps"):
        _trained(Job(job.recipe, job.output, str(other)))


def test_a_checkpoint_counts_samples_and_tokens(make: MakeRecipe, samples: str, tmp_path: Path) -> None:
    job = _job(make("t2v_192p_12fps", "training.schedule.max_steps=3"), samples, tmp_path)
    _trained(job)
    newest = latest(str(job.folder / "checkpoints"))
    assert newest is not None
    progress = read_complete(newest)["progress"]
    drawn = sum(line["samples"] for line in read_metrics(job.folder) if "samples" in line)
    assert progress["samples_seen"] == drawn > 0
    assert progress["tokens_seen"] > drawn * 16
