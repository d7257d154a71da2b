"""The plan of a stage: nothing lost, drawn as often as weights say, the same on any number of workers and after any stop."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.cost import MicroBatchCost
from training.data.epochs import Draw, Step
from training.data.plan import TEXT_TOKENS, Plan
from training.recipe import Recipe
from waver_core.errors import UserError
from waver_core.shapes import VideoShape

SHAPES = (VideoShape(9, 64, 64), VideoShape(17, 64, 64), VideoShape(9, 64, 96), VideoShape(1, 64, 64), VideoShape(1, 96, 64))


def make_recipe(*, epochs: float = 1, max_steps: int | None = None, task: str = "t2v", **data: Any) -> Recipe:
    """A tiny stage of videos and images; keywords are settings of `data`."""
    sizes = ((64, 64), (64, 96), (96, 64))
    return Recipe(
        stage="t2v_tiny",
        task=task,
        after=None,
        tier="480p",
        video_sizes=sizes if task == "t2v" else (),
        image_sizes=sizes,
        fps=4 if task == "t2v" else None,
        epochs=epochs,
        shift=1,
        model={"preset": "tiny"},
        encoders={"autoencoder": {"backend": "dct"}, "text": [{"backend": "hashed_words"}]},
        data={"micro_batch_tokens": 400, "micro_batches_per_step": 4, "max_per_pack": 6, **data},
        optimizer={"lr": 1e-4},
        timesteps={"image": {"distribution": "uniform"}, "video": {"distribution": "uniform"}},
        schedule={"max_steps": max_steps},
        **{name: {} for name in ("alignment", "refinement", "sampling", "workers")},
    )


def make_samples(
    n: int, seed: int = 0, *, weights: Any = 1.0, windows: int = 1, held_out: int = 0, images: bool = True
) -> pa.Table:
    """`n` samples of random shapes and text lengths; every `windows` of them are of one clip, the last ones held out."""
    rng = np.random.default_rng(seed)
    shape = np.repeat(rng.integers(0, len(SHAPES) if images else 3, -(-n // windows)), windows)[:n]
    chosen = [SHAPES[i] for i in shape]
    return pa.table(
        {
            "clip_id": [f"c{i // windows}" for i in range(n)],
            "kind": ["image" if s.is_image else "video" for s in chosen],
            "frames": pa.array([s.frames for s in chosen], pa.int32()),
            "height_px": pa.array([s.height_px for s in chosen], pa.int32()),
            "width_px": pa.array([s.width_px for s in chosen], pa.int32()),
            "weight": np.broadcast_to(np.asarray(weights, np.float64), n),
            "held_out": np.arange(n) >= n - held_out,
            "text_tokens": pa.array(rng.integers(1, 60, n), pa.int32()),
        }
    )


def tokens_of(samples: pa.Table) -> np.ndarray:
    """Tokens of each row with its text."""
    rows = samples.select(["frames", "height_px", "width_px", "text_tokens"]).to_pylist()
    return np.array([VideoShape(r["frames"], r["height_px"], r["width_px"]).latent.tokens + r["text_tokens"] for r in rows])


def draws_of(steps: Any) -> list[Draw]:
    """All draws in order."""
    return [draw for step in steps for batch in step.micro_batches for draw in batch]


PACKINGS = st.sampled_from(["spfhp", "bucket"])


@given(n=st.integers(1, 120), seed=st.integers(0, 99), packing=PACKINGS, per_step=st.integers(1, 9), epoch=st.integers(0, 3))
def test_every_sample_is_drawn_once_and_every_micro_batch_keeps_its_limits(
    n: int, seed: int, packing: str, per_step: int, epoch: int
) -> None:
    samples = make_samples(n, seed, held_out=n // 5)
    recipe = make_recipe(packing=packing, micro_batches_per_step=per_step, epochs=4)
    plan, tokens = Plan(samples, recipe), tokens_of(samples)
    steps = plan.steps(epoch)
    assert sorted(draws_of(steps)) == [Draw(row, epoch, 0) for row in range(n - n // 5)]
    kinds = samples["kind"].to_pylist()
    shapes = list(zip(*(samples[c].to_pylist() for c in ("frames", "height_px", "width_px"))))
    smaller: Counter[str] = Counter()
    for step in steps:
        assert 1 <= len(step.micro_batches) <= per_step
        smaller[step.bucket] += len(step.micro_batches) < per_step
        for batch in step.micro_batches:
            rows = [draw.row for draw in batch]
            assert 1 <= len(rows) <= 6
            assert tokens[rows].sum() <= 400 or len(rows) == 1
            assert {kinds[row] for row in rows} == {step.bucket.split("/")[0]}
            if packing == "bucket":
                assert {"x".join(map(str, shapes[row])) for row in rows} == {step.bucket.split("/")[1]}
    assert all(count <= 1 for count in smaller.values())  # the last of each bucket only
    held = [draw.row for batch in plan.held_out() for draw in batch]
    assert sorted(held) == list(range(n - n // 5, n))


@given(seed=st.integers(0, 99), world=st.integers(1, 9), packing=PACKINGS)
def test_the_workers_together_train_the_step_whatever_their_number(seed: int, world: int, packing: str) -> None:
    plan = Plan(make_samples(80, seed), make_recipe(packing=packing, micro_batches_per_step=6))
    for step in plan.steps(0):
        shares = [step.share(rank, world) for rank in range(world)]
        assert sorted(batch for share in shares for batch in share) == sorted(step.micro_batches)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert max(map(len, shares)) == -(-len(step.micro_batches) // world)
        assert step.share(0, 1) == step.micro_batches
        assert [step.share(rank, world) for rank in range(world)] == shares


@given(seed=st.integers(0, 99), epochs=st.sampled_from([0.3, 1.0, 1.5, 2.0, 2.7]), cut=st.floats(0, 1), packing=PACKINGS)
@settings(max_examples=30)
def test_a_run_that_stops_anywhere_goes_on_where_it_was(seed: int, epochs: float, cut: float, packing: str) -> None:
    samples, recipe = make_samples(60, seed, weights=1.3), make_recipe(packing=packing, epochs=epochs, seed=seed)
    whole = Plan(samples, recipe)
    total = whole.total_steps()
    steps = [step for epoch in range(4) for step in whole.steps(epoch)]
    assert len(steps) == total
    at = min(int(cut * total), total - 1)
    resumed = Plan(samples, recipe)  # a new process that has drawn nothing yet

    def step(index: int) -> Step:
        epoch, within = resumed.locate(index)
        return resumed.steps(epoch)[within]

    assert [step(index) for index in range(at, total)] == steps[at:]
    for outside in (-1, total):
        with pytest.raises(IndexError):
            whole.locate(outside)


def test_the_same_seed_gives_the_same_plan_and_another_seed_or_epoch_another_order() -> None:
    samples = make_samples(200)
    plans = {seed: Plan(samples, make_recipe(epochs=2, seed=seed)) for seed in (0, 1)}
    first = list(plans[0].steps(0))
    assert first == list(Plan(samples, make_recipe(epochs=2)).steps(0))
    assert first == list(plans[0].steps(0))
    for other in (plans[0].steps(1), plans[1].steps(0)):
        assert [d.row for d in draws_of(other)] != [d.row for d in draws_of(first)]
        assert sorted(d.row for d in draws_of(other)) == sorted(d.row for d in draws_of(first))


def test_other_samples_meet_in_a_pack_every_epoch_also_where_hardly_two_are_of_one_length() -> None:
    n = 300
    samples = make_samples(n, images=False)
    columns = {"frames": [29, 45, 61] * 100, "height_px": [480] * n, "width_px": [864] * n, "text_tokens": range(40, 40 + n)}
    for name, values in columns.items():
        samples = samples.set_column(samples.schema.get_field_index(name), name, pa.array(list(values), pa.int32()))
    plan = Plan(samples, make_recipe(epochs=2, micro_batch_tokens=65_536, max_per_pack=64))
    first, second = ([frozenset(d.row for d in b) for s in plan.steps(e) for b in s.micro_batches] for e in (0, 1))
    assert len(set(first) & set(second)) < len(first) / 10
    assert plan.report["video"]["efficiency"] > 0.9


@pytest.mark.parametrize("packing", ["spfhp", "bucket"])
def test_rows_are_drawn_as_often_as_their_weights_say(packing: str) -> None:
    weights = np.tile([0.0, 0.25, 1.0, 2.6], 25)
    epochs = 200
    plan = Plan(make_samples(100, weights=weights), make_recipe(packing=packing, epochs=epochs))
    count = np.zeros(100)
    for epoch in range(epochs):
        draws = draws_of(plan.steps(epoch))
        times = np.bincount([d.row for d in draws], minlength=100)
        assert ((times == np.floor(weights)) | (times == np.ceil(weights))).all()
        assert sorted(draws) == [Draw(row, epoch, k) for row in range(100) for k in range(times[row])]
        count += times
    mean = count.reshape(25, 4) / epochs
    assert mean[:, 0].max() == 0 and (mean[:, 2] == 1).all()
    assert np.abs(mean[:, [1, 3]] - [0.25, 2.6]).max() < 0.15  # four deviations of a row
    assert mean[:, [1, 3]].mean(axis=0) == pytest.approx([0.25, 2.6], abs=0.03)


def test_the_windows_of_a_clip_take_turns_and_share_its_draws() -> None:
    order = np.random.default_rng(1).permutation(60)  # encoded in whatever order
    samples = make_samples(60, weights=1 / 3, windows=3).take(order)
    plan = Plan(samples, make_recipe(epochs=300))
    count = np.zeros(60)
    clips = np.array(samples["clip_id"].to_pylist())
    for epoch in range(300):
        rows = [d.row for d in draws_of(plan.steps(epoch))]
        assert len(rows) == 20 and len(set(clips[rows])) == 20
        count += np.bincount(rows, minlength=60)
    assert np.abs(count / 300 - 1 / 3).max() < 0.12


@pytest.mark.parametrize("share", [0.0, 0.2, 0.75, 1.0])
def test_images_get_their_share(share: float) -> None:
    samples = make_samples(2000)
    kinds = np.array(samples["kind"].to_pylist())
    drawn = kinds[[d.row for d in draws_of(Plan(samples, make_recipe(image_share=share)).steps(0))]]
    assert np.mean(drawn == "image") == pytest.approx(share, abs=0.02)
    assert (drawn == "video").sum() == (0 if share == 1 else (kinds == "video").sum())
    everything = Plan(samples, make_recipe(image_share=None))
    assert len(draws_of(everything.steps(0))) == 2000


def test_a_share_of_what_there_is_not_is_refused_and_a_stage_of_images_ignores_it() -> None:
    with pytest.raises(UserError, match=r"image_share is 0\.2, but stage 't2v_tiny' has no image sample: .*image_share to 0"):
        Plan(make_samples(50, images=False), make_recipe(image_share=0.2))
    samples = make_samples(100)
    pictures = samples.filter(np.array(samples["kind"].to_pylist()) == "image")
    assert len(draws_of(Plan(pictures, make_recipe(task="t2i", image_share=0.2)).steps(0))) == len(pictures)
    with pytest.raises(UserError, match="has nothing to draw"):
        Plan(make_samples(50, weights=0.0), make_recipe())


@pytest.mark.parametrize("packing", ["spfhp", "bucket"])
def test_a_part_of_an_epoch_is_a_part_of_its_steps(packing: str) -> None:
    samples = make_samples(200, weights=np.tile([0.5, 1.5], 100))
    whole, part = (Plan(samples, make_recipe(epochs=e, packing=packing)) for e in (2, 1.5))
    n = [len(whole.steps(epoch)) for epoch in range(3)]
    assert whole.total_steps() == n[0] + n[1] and n[2] == 0
    assert part.total_steps() == n[0] + round(n[1] / 2)
    assert list(part.steps(1)) == list(whole.steps(1))[: round(n[1] / 2)]
    assert part.locate(n[0]) == (1, 0)
    with pytest.raises(ValueError):
        whole.steps(-1)


def test_max_steps_decides_alone() -> None:
    samples = make_samples(100)
    n = len(Plan(samples, make_recipe()).steps(0))
    short, long = (Plan(samples, make_recipe(max_steps=m)) for m in (2, 3 * n + 1))
    assert short.total_steps() == 2 == len(short.steps(0)) and len(short.steps(1)) == 0
    assert long.total_steps() == 3 * n + 1 and [len(long.steps(e)) for e in range(5)] == [n, n, n, 1, 0]
    assert long.locate(3 * n) == (3, 0)


def long_and_short(n: int) -> pa.Table:
    """Videos of 480p: one in ten fills a micro-batch alone."""
    frames = np.where(np.arange(n) % 10 == 0, 157, 29).astype(np.int32)
    columns = {"frames": frames, "height_px": np.full(n, 480, np.int32), "width_px": np.full(n, 864, np.int32)}
    samples = make_samples(n, images=False)
    for name, values in columns.items():
        samples = samples.set_column(samples.schema.get_field_index(name), name, pa.array(values))
    return samples


LARGE = {"micro_batch_tokens": 65_536, "max_per_pack": 64}


def test_steps_hold_packs_of_about_the_same_cost() -> None:
    """A pack of one long sequence costs several times one of many short ones, so they never meet in a step."""
    samples = long_and_short(400)
    tokens = tokens_of(samples)
    measured = {"fixed_s": 0.1, "per_token_s": 1e-5, "per_pair_s": 5e-10}
    for setting, even_at in ((None, 6 * 128), (measured, None)):  # the preset `tiny` is 128 wide
        plan = Plan(samples, make_recipe(cost=setting, **LARGE))
        per_pair = measured["per_pair_s"] if even_at is None else measured["per_token_s"] / even_at
        fixed = measured["fixed_s"] if even_at is None else 0.0
        cost = MicroBatchCost(fixed_s=fixed, per_token_s=1e-5, per_pair_s=per_pair)
        wanted = [[cost.of([int(tokens[d.row]) for d in batch]) for batch in step.micro_batches] for step in plan.steps(0)]
        assert max(max(c) / min(c) for c in wanted) <= 1.25 * 1.02  # lengths were rounded up before they were packed
        assert max(map(max, wanted)) / min(map(max, wanted)) > 2
        for step, costs in zip(plan.steps(0), wanted):
            ratio = np.array(step.costs) / costs  # counted in seconds of another machine
            assert ratio == pytest.approx(np.full(len(costs), ratio[0]))
            if even_at is None:
                assert ratio[0] == pytest.approx(1)
            assert step.costs[step.micro_batches.index(step.cheapest)] == min(step.costs)


def test_a_measured_cost_decides_what_meets_in_a_step() -> None:
    samples = long_and_short(400)
    buckets = {}
    for per_pair in (0.0, 1e-12, 1e-9):
        plan = Plan(samples, make_recipe(cost={"fixed_s": 1.0, "per_token_s": 0.0, "per_pair_s": per_pair}, **LARGE))
        buckets[per_pair] = len({step.bucket for step in plan.steps(0)})
        assert sorted(draws_of(plan.steps(0))) == [Draw(row, 0, 0) for row in range(400)]
    assert buckets[0.0] == buckets[1e-12] == 1 < buckets[1e-9]  # where only launches take time, all packs are alike


@pytest.mark.parametrize("packing", ["spfhp", "bucket"])
def test_workers_get_equal_work_and_the_same_at_every_place(packing: str) -> None:
    plan = Plan(make_samples(900, images=False), make_recipe(packing=packing, micro_batches_per_step=32))
    waits = {"cost": 0.0, "turns": 0.0}
    for step in plan.steps(0):
        if len(step.micro_batches) < 32:
            continue
        cost = dict(zip(step.micro_batches, step.costs))
        shares = [step.share(rank, 8) for rank in range(8)]
        loads = [sum(cost[batch] for batch in share) for share in shares]
        assert max(loads) - min(loads) <= max(step.costs) - min(step.costs)
        for name, dealt in (("cost", shares), ("turns", [step.micro_batches[rank::8] for rank in range(8)])):
            places = [[cost[batch] for batch in place] for place in zip(*dealt)]
            waits[name] += sum(max(place) - sum(place) / 8 for place in places)
    assert 0 < waits["cost"] < 0.5 * waits["turns"]


def test_a_refiner_s_windows_make_long_videos_cheaper() -> None:
    samples = long_and_short(200)
    overrides = {"dual_blocks": 4, "single_blocks": 16}
    steps = {}
    for task in ("t2v", "refine"):
        recipe = make_recipe(**LARGE, packing="bucket").model_copy(update={"task": task})
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"overrides": overrides})})
        steps[task] = list(Plan(samples, recipe).steps(0))
        packed = Plan(samples, recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": "spfhp"})}))
        ratios = [max(step.costs) / min(step.costs) for step in packed.steps(0)]
        assert max(ratios) <= 1.25 * 1.02
    assert [s.micro_batches for s in steps["t2v"]] == [s.micro_batches for s in steps["refine"]]
    cheaper = {
        step.bucket: np.array(windowed.costs).sum() / np.array(step.costs).sum()
        for step, windowed in zip(steps["t2v"], steps["refine"])
    }
    long, short = (cheaper[f"video/{frames}x480x864"] for frames in (157, 29))
    assert 0.4 < long < short < 1  # 18 of 20 blocks in windows: attention of 0.4 of the pairs


@pytest.mark.parametrize("packing", ["spfhp", "bucket"])
def test_the_report_adds_up(packing: str) -> None:
    samples = make_samples(300, held_out=20)
    plan = Plan(samples, make_recipe(packing=packing), {"video": {"too_short": 4}, "image": {}})
    report, steps, tokens = plan.report, plan.steps(0), tokens_of(samples)
    assert set(report) == {"video", "image"}
    for key, wanted in (
        ("drawn", 280),
        ("samples", 280),
        ("held_out", 20),
        ("tokens", tokens[:280].sum()),
        ("steps", len(steps)),
        ("micro_batches", sum(len(s.micro_batches) for s in steps)),
    ):
        assert sum(kind[key] for kind in report.values()) == wanted, key
    assert report["video"]["dropped"] == {"too_short": 4} and 0 < report["video"]["dropped_share"] < 0.1
    for kind in report.values():
        assert kind["efficiency"] == pytest.approx(kind["tokens"] / (400 * kind["micro_batches"]))
        for key in ("drawn", "tokens", "steps", "micro_batches"):
            assert kind[key] == sum(bucket[key] for bucket in kind["buckets"].values())
    assert {s.bucket for s in steps} == {name for kind in report.values() for name in kind["buckets"]}


def test_too_many_clips_lost_stop_the_run() -> None:
    with pytest.raises(
        UserError, match=r"of its image clips.*too_small \(see data\.max_upscale.*raise data\.max_dropped_share"
    ) as error:
        Plan(make_samples(100), make_recipe(), {"video": {}, "image": {"too_small": 60, "no_caption": 1}})
    assert "\n" not in str(error.value)


def test_without_a_count_of_text_tokens_a_cap_is_taken() -> None:
    samples = make_samples(40, images=False).drop_columns(["text_tokens"])
    report = Plan(samples, make_recipe(micro_batch_tokens=2000)).report
    shapes = zip(*(samples[c].to_pylist() for c in ("frames", "height_px", "width_px")))
    assert report["video"]["tokens"] == sum(VideoShape(*s).latent.tokens + TEXT_TOKENS for s in shapes)


def test_a_sample_longer_than_a_micro_batch_stands_alone() -> None:
    for packing in ("spfhp", "bucket"):
        plan = Plan(make_samples(30), make_recipe(packing=packing, micro_batch_tokens=10))
        assert all(len(batch) == 1 for step in plan.steps(0) for batch in step.micro_batches)
        assert plan.report["video"]["efficiency"] == 1.0
