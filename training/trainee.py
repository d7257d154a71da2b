"""What a stage optimises: the transformer, the head that aligns it with semantic features, and their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.conditioning import Example
from training.recipe import Recipe
from waver_core.dit import DiTConfig, WaverDiT, preset
from waver_core.errors import UserError
from waver_core.flow.objectives import alignment_loss, flow_loss
from waver_core.shapes import LatentShape


class Losses(NamedTuple):
    """Losses of the samples of a micro-batch, fp32 [S] each; `total` is what is optimised."""

    total: Tensor
    flow: Tensor
    alignment: Tensor | None


class AlignmentHead(nn.Module):
    """Projects the transformer's tokens to the width of the semantic features (Waver §4.2, g_phi)."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, dim))

    def reset_parameters(self) -> None:
        """Start values."""
        for layer in self.layers:
            if isinstance(layer, nn.LayerNorm | nn.Linear):
                layer.reset_parameters()

    def forward(self, tokens: Tensor, shapes: Sequence[LatentShape], grids: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Video tokens [N, D] of all samples -> [Tf, Hf, Wf, dim] each: averaged down to the features' grid, then projected."""
        pooled = []
        for part, shape, grid in zip(tokens.split([s.tokens for s in shapes]), shapes, grids, strict=True):
            cells = part.unflatten(0, shape.grid).permute(3, 0, 1, 2)
            pooled.append(F.adaptive_avg_pool3d(cells, grid).permute(1, 2, 3, 0).flatten(0, 2))
        projected = self.layers(torch.cat(pooled)).split([len(p) for p in pooled])
        return [p.unflatten(0, tuple(grid)) for p, grid in zip(projected, grids, strict=True)]


class Trainee(nn.Module):
    """The transformer and, for stages with alignment, its head."""

    def __init__(self, config: DiTConfig, recipe: Recipe, feature_dim: int | None) -> None:
        super().__init__()
        self.dit = WaverDiT(config)
        self.recipe = recipe
        self.tap: int | None = None
        self.alignment: AlignmentHead | None = None
        if recipe.align:
            if feature_dim is None:
                raise ValueError("alignment needs the width of the features")
            self.tap = aligned_block(recipe.alignment.block, config.blocks)
            if self.tap > config.blocks:
                told = f"alignment.block {recipe.alignment.block} lies beyond the last block"
                raise UserError(f"{told}: give one of the report's 56, of which the one at the same depth is taken")
            self.alignment = AlignmentHead(config.width, recipe.alignment.hidden, feature_dim)

    def forward(self, examples: Sequence[Example]) -> Losses:
        """Losses of a micro-batch."""
        timesteps = torch.stack([e.t for e in examples])
        predicted, tapped = self.dit.velocity([e.inputs for e in examples], [e.texts for e in examples], timesteps, self.tap)
        flow = flow_loss([p.float() for p in predicted], [e.target for e in examples])
        if self.alignment is None or tapped is None:
            return Losses(flow, flow, None)
        features = [e.features for e in examples if e.features is not None]
        if len(features) < len(examples):
            raise ValueError("a stage with alignment needs samples encoded with features")
        shapes = [LatentShape(*e.inputs.shape[1:]) for e in examples]
        projected = self.alignment(tapped, shapes, [tuple(f.shape[:3]) for f in features])
        aligned = alignment_loss([p.float() for p in projected], features)
        return Losses(flow + self.recipe.alignment.weight * aligned, flow, aligned)


def aligned_block(block: int, blocks: int) -> int:
    """The 16th of the report's 56 blocks, or the one at the same depth of a smaller model."""
    return max(1, round(block * blocks / 56)) if blocks < 56 else block


def model_config(recipe: Recipe, text_dims: Sequence[int]) -> DiTConfig:
    """The network of a recipe: its preset for these text encoders; a refiner attends in windows (§2.2)."""
    fixed = {"text_dims": tuple(text_dims), **({"windowed": True} if recipe.task == "refine" else {})}
    return preset(recipe.model.preset, **{**fixed, **recipe.model.overrides})
