"""What a stage optimises: the flow loss of every sample alone, plus half of the alignment (Waver §4.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.conditioning import Example
from training.recipe import Recipe
from training.trainee import AlignmentHead, Losses, Trainee, aligned_block, model_config
from waver_core.dit import PRESETS, DiTConfig
from waver_core.errors import ConfigError, UserError
from waver_core.flow.objectives import alignment_loss, flow_loss
from waver_core.shapes import LatentShape

Make = Callable[..., Recipe]
CONFIG = DiTConfig(2, 4, 2, 16, text_dims=(4, 6), max_grid=(4, 8, 8))
SHAPES = [(3, 4, 4), (1, 6, 4), (3, 4, 4)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def examples() -> list[Example]:
    g = torch.Generator().manual_seed(1)
    found = []
    for i, shape in enumerate(SHAPES):
        texts = tuple(torch.randn(2 + i, dim, generator=g) for dim in CONFIG.text_dims)
        features = torch.randn(1, shape[1] // 4, shape[2] // 4, 5, generator=g)
        parts = torch.randn(36, *shape, generator=g), torch.randn(16, *shape, generator=g), torch.rand((), generator=g)
        found.append(Example(*parts, texts, features, "video" if shape[0] > 1 else "image", "t2v"))
    return found


def trainee_of(recipe: Recipe, **fields: Any) -> Trainee:
    trainee = Trainee(CONFIG, recipe, fields.get("feature_dim", 5))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainee.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return trainee


def test_tokens_are_averaged_down_to_the_grid_of_the_features() -> None:
    head = AlignmentHead(6, 8, 5)
    head.layers = torch.nn.Identity()  # what is pooled, seen as it is
    shapes = [LatentShape(4, 8, 4), LatentShape(1, 4, 4)]
    tokens = torch.randn(sum(s.tokens for s in shapes), 6, generator=torch.Generator().manual_seed(0))
    first, second = head(tokens, shapes, [(1, 2, 1), (1, 1, 1)])
    assert first.shape == (1, 2, 1, 6) and second.shape == (1, 1, 1, 6)
    cells = tokens[: shapes[0].tokens].view(4, 4, 2, 6)
    assert torch.allclose(first[0, 0, 0], cells[:, :2].mean((0, 1, 2)), atol=1e-6)
    assert torch.allclose(first[0, 1, 0], cells[:, 2:].mean((0, 1, 2)), atol=1e-6)
    assert torch.allclose(second[0, 0, 0], tokens[shapes[0].tokens :].mean(0), atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 1), (5, 4, 4)])
def test_any_grid_of_features_is_met(grid: tuple[int, int, int]) -> None:
    head = AlignmentHead(6, 8, 5)
    shape = LatentShape(5, 7, 9)
    (out,) = head(torch.randn(shape.tokens, 6), [shape], [grid])
    assert out.shape == (*grid, 5)


def test_alignment_weighs_one_half_and_its_gradient_reaches_the_blocks_before_the_tap(encoding_recipe: Make) -> None:
    trainee = trainee_of(encoding_recipe("t2v_480p", "training.alignment={hidden: 8}"))
    assert trainee.tap == 2
    losses = trainee(examples())
    assert losses.alignment is not None and losses.flow.shape == losses.alignment.shape == losses.total.shape == (3,)
    assert torch.allclose(losses.total, losses.flow + 0.5 * losses.alignment)
    assert (losses.alignment.abs() <= 1).all()
    losses.alignment.sum().backward()
    reached = {name for name, p in trainee.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("dit.dual_blocks.1.video") for name in reached) and "alignment.layers.3.weight" in reached
    assert not any(name.startswith(("dit.single_blocks", "dit.video_out", "dit.final")) for name in reached)


def test_losses_are_those_of_their_formulas(encoding_recipe: Make) -> None:
    trainee, batch = trainee_of(encoding_recipe("t2v_480p", "training.alignment={hidden: 8}")), examples()
    losses = trainee(batch)
    predicted, tapped = trainee.dit.velocity(
        [e.inputs for e in batch], [e.texts for e in batch], torch.stack([e.t for e in batch]), 2
    )
    assert torch.allclose(losses.flow, flow_loss(predicted, [e.target for e in batch]))
    assert trainee.alignment is not None and tapped is not None
    grids = [tuple(e.features.shape[:3]) for e in batch if e.features is not None]
    projected = trainee.alignment(tapped, [LatentShape(*s) for s in SHAPES], grids)
    assert torch.allclose(losses.alignment, alignment_loss(projected, [e.features for e in batch]))


@pytest.mark.parametrize("stage", ["t2v_480p", "t2v_192p_12fps"])
def test_a_sample_has_the_loss_that_it_has_alone(stage: str, encoding_recipe: Make) -> None:
    trainee, batch = trainee_of(encoding_recipe(stage, "training.alignment={hidden: 8}")), examples()
    together: Losses = trainee(batch)
    for i, example in enumerate(batch):
        assert torch.allclose(trainee([example]).total, together.total[i : i + 1], rtol=1e-5)


def test_without_alignment_there_is_no_head_and_the_total_is_the_flow(encoding_recipe: Make) -> None:
    trainee = trainee_of(encoding_recipe("t2v_192p_12fps"))
    losses = trainee([e._replace(features=None) for e in examples()])
    assert trainee.alignment is None and trainee.tap is None and losses.alignment is None
    assert torch.equal(losses.total, losses.flow)


def test_alignment_without_features_is_refused(encoding_recipe: Make) -> None:
    recipe = encoding_recipe("t2v_480p", "training.alignment={hidden: 8}")
    batch = examples()
    with pytest.raises(ValueError, match="encoded with features"):
        trainee_of(recipe)([batch[0], batch[1]._replace(features=None)])
    with pytest.raises(ValueError, match="width of the features"):
        trainee_of(recipe, feature_dim=None)


def test_a_block_beyond_the_last_is_never_aligned_in_silence(encoding_recipe: Make) -> None:
    recipe = encoding_recipe("t2v_480p", "training.alignment={hidden: 8, block: 70}")
    with pytest.raises(UserError, match="beyond the last block"):
        trainee_of(recipe)


def test_the_aligned_block_is_the_16th_of_56_or_as_deep() -> None:
    assert aligned_block(16, 56) == 16
    assert aligned_block(16, PRESETS["tiny"].blocks) == 2
    assert aligned_block(16, 28) == 8 and aligned_block(16, 14) == 4
    assert aligned_block(16, 1) == aligned_block(1, 6) == 1
    assert aligned_block(16, 72) == 16


def test_the_network_is_the_recipes_for_its_text_encoders(encoding_recipe: Make) -> None:
    base = model_config(encoding_recipe("t2v_480p"), [16, 24])
    assert base.text_dims == (16, 24) and not base.windowed
    assert model_config(encoding_recipe("refine_1080p"), [16, 24]).windowed
    changed = encoding_recipe("refine_1080p", "training.model={preset: tiny, overrides: {windowed: false, heads: 2}}")
    assert not model_config(changed, [16]).windowed and model_config(changed, [16]).heads == 2
    with pytest.raises(ConfigError, match="did you mean 'heads'"):
        model_config(encoding_recipe("t2v_480p", "training.model={preset: tiny, overrides: {head: 2}}"), [16])
