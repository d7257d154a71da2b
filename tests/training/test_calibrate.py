"""Calibration: packs that tell the three costs apart, a part scaled to the whole, and a setting that the recipe takes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import balance
from training import calibrate
from training.calibrate import Pack, device_of, measure, packs_up_to, reduced, setting
from training.command_line import recipe_of
from training.data.cost import Fit, MicroBatchCost, fit_cost
from training.recipe import Recipe
from training.trainee import Trainee
from waver_core.dit import preset
from waver_core.errors import UserError

TRUE = MicroBatchCost(fixed_s=0.02, per_token_s=3e-5, per_pair_s=2e-8)
SMALL = "training.model={preset: tiny, overrides: {dual_blocks: 1, single_blocks: 2, heads: 2, head_dim: 16, full_blocks: 1}}"


def recipe_for(stage: str = "t2v_480p", *sets: str) -> Recipe:
    """A stage of the embedded profile with a smaller model."""
    return recipe_of(stage, None, None, [SMALL, *sets])


@pytest.mark.parametrize(("name", "tokens"), [("tiny", 192), ("tiny", 3072), ("waver_12b", 65_536), ("waver_12b", 220_000)])
def test_packs_are_full_ragged_and_unlike_one_another(name: str, tokens: int) -> None:
    config = preset(name)
    packs = packs_up_to(tokens, 64, config)
    for pack in packs:
        assert all(axis <= most for shape in pack.shapes for axis, most in zip(shape.grid, config.max_grid))
        assert min(pack.texts) >= len(config.text_dims)
        assert pack.pairs(config) == sum((shape.tokens + text) ** 2 for shape, text in zip(pack.shapes, pack.texts))
        if len(pack.shapes) > 1:
            assert len({shape.tokens + text for shape, text in zip(pack.shapes, pack.texts)}) > 1
    full = packs[:-3]
    assert all(0.85 * tokens < pack.tokens < 1.15 * tokens for pack in full)
    assert max(p.pairs(config) for p in full) > 4 * min(p.pairs(config) for p in full)
    assert packs[-1].tokens < tokens / 5
    assert max(len(p.shapes) for p in packs_up_to(tokens, 3, config)) <= 3


def test_exact_times_give_back_their_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, config = recipe_for("refine_1080p"), preset("tiny", windowed=True)

    def timed(trainee: Trainee, packs: list[Pack], *_: Any) -> list[float]:
        both = [(pack.tokens, pack.pairs(trainee.dit.config)) for pack in packs]
        return [TRUE.fixed_s + TRUE.per_token_s * tokens + TRUE.per_pair_s * pairs for tokens, pairs in both]

    monkeypatch.setattr(calibrate, "_timed", timed)
    fit = fit_cost(measure(recipe, config, config, packs_up_to(2048, 32, config), "cpu", 1))
    assert list(fit.cost.model_dump().values()) == pytest.approx(list(TRUE.model_dump().values()), rel=1e-6)


def test_the_time_of_some_blocks_is_scaled_to_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = preset("tiny", dual_blocks=4, single_blocks=8)
    part = reduced(model, 3)

    def timed(trainee: Trainee, packs: list[Pack], *_: Any) -> list[float]:
        dit = trainee.dit
        real = sum(any(True for _ in block.parameters()) for block in (*dit.dual_blocks, *dit.single_blocks))
        return [5.0 + 0.5 * real] * len(packs)

    monkeypatch.setattr(calibrate, "_timed", timed)
    packs = packs_up_to(512, 8, part)
    found = measure(recipe_for(), model, part, packs, "cpu", 1)
    assert [m.seconds for m in found] == pytest.approx([5.0 + 0.5 * 12] * len(packs))


def test_a_part_keeps_the_kinds_of_blocks_and_windows() -> None:
    whole = preset("waver_12b", windowed=True)
    part = reduced(whole, 7)
    assert (part.dual_blocks, part.single_blocks, part.full_blocks, part.width) == (2, 5, 1, 3072)
    assert {part.attention_kind(block) for block in range(part.blocks)} == {"full", "space", "time"}
    assert reduced(whole, 1).dual_blocks == 1
    assert reduced(preset("waver_12b_dual"), 4).single_blocks == 0
    assert reduced(whole, 56) == reduced(whole, 99) == whole


@pytest.mark.parametrize(("stage", "dtype"), [("t2v_480p", "float32"), ("refine_1080p", "bfloat16")])
def test_it_times_what_the_loop_computes(stage: str, dtype: str) -> None:
    recipe = recipe_for(stage, f"training.workers.dtype={dtype}")
    model = calibrate.calibrated_model(recipe)
    part = reduced(model, 2)
    packs = packs_up_to(192, 4, part)[1:3]
    for built in (model, part):
        measured = measure(recipe, model, built, packs, "cpu", 1)
        assert [m.tokens for m in measured] == [p.tokens for p in packs]
        assert all(m.seconds > 0 for m in measured)
    trainee = calibrate.build(recipe, model, "cpu")
    losses = trainee(calibrate._examples(packs[0], model, "cpu"))
    losses.total.mean().backward()
    still = [name for name, p in trainee.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []  # a backward of zeros would be timed else


def test_the_setting_that_it_prints_is_one_that_a_recipe_takes() -> None:
    assert recipe_for("sft", setting(TRUE)).data.cost == TRUE
    small = MicroBatchCost(fixed_s=0.0, per_token_s=1e-7, per_pair_s=0.0)
    assert recipe_for("sft", setting(small)).data.cost == small
    command = ["--stage", "t2v_480p", "--tokens", "192", "--repeats", "1", "--blocks", "2", "--set", SMALL]
    result = CliRunner().invoke(calibrate.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "2 of 3 blocks, scaled up" in result.output and "Fit error:" in result.output
    printed = re.search(r"--set '(training\.data\.cost=.*)'", result.output)
    assert printed is not None
    cost = recipe_for("t2v_480p", printed[1]).data.cost
    assert cost is not None and cost.of([100, 50]) > 0


def test_a_cost_that_is_none_is_refused_with_its_place() -> None:
    with pytest.raises(UserError, match=r"cost.*a micro-batch takes time"):
        recipe_for("sft", "training.data.cost={fixed_s: 0, per_token_s: 0, per_pair_s: 0}")
    with pytest.raises(UserError, match="cost"):
        recipe_for("sft", "training.data.cost={fixed_s: 0, per_token_s: 1}")


def test_without_the_recipe_s_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--set training\.workers\.gpus=0"):
        device_of(recipe_for("sft", "training.workers.gpus=1"))
    assert device_of(recipe_for("sft")) == "cpu"


def test_the_benchmark_shows_less_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(balance, "_measured", lambda *_: Fit(MicroBatchCost(**TRUE.model_dump()), (0.0,)))
    monkeypatch.setattr(balance, "PER_STEP", 128)
    monkeypatch.setattr(balance.common, "finish", lambda name, figures, *_: told.update({name: figures}))
    result = CliRunner().invoke(balance.app, ["--samples", "20000"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ways = told["balance"]["ways"]
    for world in balance.WORLDS:
        before, in_turns, counted, measured = (way["workers"][world]["in_step"] for way in ways)
        assert 1 <= counted <= in_turns + 1e-9 < before - 0.1
        assert 1 <= measured < 1.15 < before
        assert all(1 <= way["workers"][world]["in_sum"] <= way["workers"][world]["in_step"] + 1e-9 for way in ways)
    assert ways[0]["buckets"] == 1 < ways[3]["buckets"]
    given = CliRunner().invoke(balance.app, ["--samples", "20000", "--set", setting(TRUE)], catch_exceptions=False)
    assert given.exit_code == 0 and told["balance"]["ways"] == ways
    monkeypatch.setattr(balance, "_measured", lambda *_: Fit(TRUE, (0.5, -0.5)))
    doubtful = CliRunner().invoke(balance.app, ["--samples", "20000"])
    assert doubtful.exit_code != 0 and "such a fit tells nothing" in str(doubtful.exception)
