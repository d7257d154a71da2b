"""A dry run: what it says of the report's model on clusters of any size, and how bad input is answered."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from training.command_line import recipe_of
from training.data.plan import Plan
from training.data.samples import build_samples
from training.dry_run import app as table_app
from training.dry_run_plan import build
from training.dry_run_report import print_plan
from training.parallel.budget import stage_memory, working_bytes
from training.parallel.hardware import cluster
from training.parallel.memory import plan_memory
from training.parallel.mesh import MeshPlan
from training.parallel.state import activation_budget, state_bytes
from training.recipe import Recipe
from training.stage import app as stage_app
from training.trainee import model_config
from waver_core.dit import preset
from waver_core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SPREAD = "training.parallel={shard: 8, sequence: 8, checkpointing: auto, offload: auto, compile: true}"


def _full(stage: str, *sets: str) -> Recipe:
    return recipe_of(stage, None, ["full"], [SPREAD, *sets])


def _invoke(*arguments: str) -> str:
    """Standard output of training/stage.py; errors are raised."""
    return CliRunner().invoke(stage_app, arguments, catch_exceptions=False).stdout


@pytest.mark.parametrize("stage", ["ct_720p", "refine_1080p"])
def test_a_thousand_gpus_in_seconds(stage: str) -> None:
    recipe = _full(stage)
    started = time.process_time()
    plan = build(recipe, cluster("1024xH100"))
    assert time.process_time() - started < 5
    mesh = plan.setting.mesh
    assert (mesh.replicate, mesh.shard, mesh.sequence, plan.setting.rounds) == (16, 8, 8, 2)
    assert plan.memory.parameters.total == pytest.approx(12.3e9, rel=0.01)
    activations = plan.setting.memory.device_bytes
    assert max(row.cost.device_bytes for row in plan.shapes) <= activations <= plan.memory.budget_bytes
    assert plan.memory.state.total + plan.memory.working_bytes + plan.memory.budget_bytes < plan.memory_bytes
    assert 0.2 < plan.mean.mfu < 0.7
    assert plan.mean.seconds == pytest.approx(sum(term.seconds for term in plan.mean.terms.values()))


def test_shapes_are_the_recipes() -> None:
    plan = build(_full("refine_1080p"), cluster("128xH100"))
    videos = {row.shape.frames: row for row in plan.shapes if row.kind == "video"}
    assert tuple(videos) == plan.recipe.frame_counts
    longest = videos[237]
    assert longest.batch.tokens == 60 * 68 * 120 + 512 and len(longest.batch.shapes) == 1
    (image,) = (row for row in plan.shapes if row.kind == "image")
    assert len(image.batch.shapes) == 65_536 // (68 * 120 + 512)
    # Three million clips of either kind, and seven images a micro-batch (Table 2, refine).
    assert plan.steps == pytest.approx((3e6 + 3e6 / 7) / 256)
    attention = [row.cost.flops.attention_share for row in plan.shapes if row.kind == "video"]
    assert attention == sorted(attention) and attention[-1] > 0.9


def test_fewer_gpus_need_more_of_each() -> None:
    few, many = (
        build(_full("ct_720p", "training.stages.ct_720p.parallel.shard=null"), cluster(text)) for text in ("8xH200", "64xH200")
    )
    assert few.memory.state.weights == 8 * many.memory.state.weights
    assert few.memory.budget_bytes < many.memory.budget_bytes
    assert few.mean.transfers["weights gathered"].link == "node" and many.mean.transfers["weights gathered"].link == "network"


def test_memory_is_planned_for_the_heaviest_sample() -> None:
    recipe = _full("ct_720p")
    config, mesh = model_config(recipe, (4096, 5120)), MeshPlan(1, 8, 8)
    memory = stage_memory(recipe, config, mesh, 80e9, on_gpu=True)
    assert memory.state == state_bytes(memory.parameters, mesh)
    working = working_bytes(config, 60 * 45 * 80 // 8 + 512 // 8, 2, 8)
    assert memory.working_bytes == working
    assert memory.budget_bytes == activation_budget(80e9, memory.state) - working
    assert memory.plan == plan_memory(config, 60 * 45 * 80 // 8, 512 // 8, 1, memory.budget_bytes, sequence=8, uniform=False)


@pytest.mark.parametrize("stage", ["t2i_256p", "t2v_192p_16fps", "t2v_480p", "ct_720p", "refine_1080p"])
def test_offloading_by_choice_is_never_slower_than_none(stage: str) -> None:
    """Short sequences compute too little to hide copies behind; more offloading than that would be waited for."""
    auto, none = (build(recipe_of(stage, None, ["full"], [f"training.parallel.offload={o}"]), cluster("128xH100")) for o in AUTO)
    assert any(auto.memory.plan.offloaded) and not any(none.memory.plan.offloaded)
    assert auto.mean.seconds < none.mean.seconds


AUTO = ("auto", "none")


def test_without_a_limit_auto_cannot_choose() -> None:
    recipe = recipe_of("sft", None, ["embedded"], [])
    config, mesh = preset("tiny", text_dims=(32, 32)), MeshPlan(1, 1, 1)
    assert set(stage_memory(recipe, config, mesh, None, on_gpu=False).plan.modes) == {"none"}
    auto = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"checkpointing": "auto"})})
    with pytest.raises(UserError, match=r"give parallel\.memory_gib"):
        stage_memory(auto, config, mesh, None, on_gpu=False)


@pytest.mark.parametrize(("stage", "text"), [("t2v_480p", "128xH100"), ("refine_1080p", "64xB200")])
def test_it_reads_well_in_a_hundred_columns(stage: str, text: str) -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_plan(build(_full(stage, "training.parallel.shard=null"), cluster(text)), console)
    told = console.export_text()
    assert max(map(len, told.splitlines())) <= 100 and "…" not in told
    words = "Parameters, single blocks, Adam's moments, activations, left, of steps, weights gathered, hidden, Ulysses"
    terms = "attention, backward; again: elementwise; offload: wait; optimiser and average; MFU 0."
    for word in (*words.split(", "), *terms.split("; ")):
        assert word in told
    assert "text encoders are not on this machine" in told
    assert ("alignment head" in told) == (stage == "t2v_480p")


def test_the_embedded_profile_on_cores() -> None:
    told = _invoke("--stage", "t2v_192p_12fps", "--dry-run", "--cluster", "4xcpu", "--output", "nowhere")
    assert "t2v_192p_12fps of tiny on 4xcpu" in told and "1 replicas x 4 shards" in told and "300 steps" in told
    assert "Training would refuse: 4 data workers share 1 micro-batches" in told
    sets = ("--set", "training.data.micro_batches_per_step=6")
    told = _invoke("--stage", "t2v_192p_12fps", "--dry-run", "--cluster", "4xcpu", "--output", "nowhere", *sets)
    assert "refuse" not in told and "2 of 4 data workers have nothing of their own to do in the last round" in told


def test_samples_are_counted_where_there_are_some(curated: str) -> None:
    recipe = recipe_of(
        "t2v_192p_12fps", None, ["embedded"], ["training.schedule.max_steps=null", "training.data.held_out_share=0"]
    )
    plan = build(recipe, cluster("2xcpu"), curated=[curated])
    built = build_samples([f"{curated}/tiers/192p"], recipe)
    counted = Plan(built.table, recipe, built.dropped)
    assert plan.steps == counted.total_steps() and plan.counted_from == f"clips in {curated}"
    drawn = {row.kind: row.steps * len(row.batch.shapes) for row in plan.shapes}
    assert drawn == {kind: pytest.approx(told["drawn"]) for kind, told in counted.report.items()}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cluster", "H100x8"), "--cluster 'H100x8' is no cluster: write workers x accelerator"),
        (("--cluster", "8xH1000"), "no accelerator 'H1000': did you mean 'H100'"),
        (("--cluster", "10xH100"), r"parallel.sequence 8 does not fit 10 workers and 24 heads"),
        (("--cluster", "24xH100"), r"parallel.shard 8 does not fit 24 workers"),
        (
            ("--cluster", "64xL40S", "--set", "training.stages.ct_720p.parallel={shard: null, sequence: 1, checkpointing: auto}"),
            "raise parallel.sequence",
        ),
        (
            (
                "--cluster",
                "8xA100",
                "--set",
                "training.stages.ct_720p.parallel={shard: null, sequence: 1, checkpointing: none, offload: none}",
            ),
            "checkpointing and parallel.offload to auto",
        ),
        (
            ("--cluster", "1xH100", "--set", "training.stages.ct_720p.parallel={shard: 1, sequence: 1}"),
            "without activations a worker takes",
        ),
        (("--cluster", "64xH100", "--measured", "nowhere.json"), "--measured nowhere.json cannot be read"),
        (("--cluster", "64xH100", "--workers", "8"), "leave --workers out"),
        ((), "--dry-run plans for a stated cluster"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError) as error:
        _invoke("--stage", "ct_720p", "--profile", "full", "--dry-run", "--set", SPREAD, *arguments)
    assert told in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2


def test_a_cluster_is_for_a_dry_run() -> None:
    with pytest.raises(UserError, match="--cluster 8xH100 is for a dry run: add --dry-run"):
        _invoke("--stage", "ct_720p", "--cluster", "8xH100")


def test_the_script_exits_with_one_line() -> None:
    command = [sys.executable, "training/stage.py", "--stage", "sft", "--dry-run", "--cluster", "8xTPU"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines() == [
        "error: no accelerator 'TPU': known: A100, B200, H100, H200, L40S, cpu",
    ]


def test_the_table_of_several_clusters() -> None:
    clusters = [word for text in ("8xH200", "64xH200", "1024xH200") for word in ("--cluster", text)]
    arguments = ["--stage", "ct_720p", "--profile", "full", "--set", SPREAD, *clusters]
    table = CliRunner().invoke(table_app, arguments, catch_exceptions=False).stdout.strip().splitlines()
    assert table[0] == "|  | 8xH200 | 64xH200 | 1024xH200 |" and table[1] == "|---|---:|---:|---:|"
    rows = {cells[1]: cells[2:-1] for cells in (list(map(str.strip, line.split("|"))) for line in table[2:])}
    assert rows["replicas x shards x sequence"] == ["1 x 1 x 8", "1 x 8 x 8", "16 x 8 x 8"]
    assert float(rows["weights, fp32"][0]) == pytest.approx(12.3e9 * 4 / 8 / 2**30, rel=0.01)
    assert all(float(cell) >= 0 for cell in rows["left"])
    assert rows["replicas' gradients"][:2] == ["-", "-"] and rows["replicas' gradients"][2].endswith("(network)")
