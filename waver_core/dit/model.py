"""Task-Unified DiT (Waver §2.1, Fig. 3, Table 1): M dual-stream blocks, then N single-stream blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from waver_core.dit.attention import SequenceGroup
from waver_core.dit.blocks import DualBlock, Rope, SingleBlock, initialise, modulated
from waver_core.dit.config import DiTConfig
from waver_core.dit.layout import Layout
from waver_core.dit.patches import patchify, unpatchify
from waver_core.dit.positions import FactorisedPositions, rope_angles, timestep_features
from waver_core.errors import UserError
from waver_core.shapes import LatentShape


class DiTOutput(NamedTuple):
    """patches [N, 64] of the predicted velocity; tapped: video tokens [N, D] after the block that was asked for, or None."""

    patches: Tensor
    tapped: Tensor | None


class TextProjection(nn.Module):
    """One text encoder's vectors to tokens of the model, with a vector that tells which encoder they come from."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.layers = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))
        self.origin = nn.Parameter(torch.zeros(width))

    def forward(self, text: Tensor) -> Tensor:
        """[L, dim] -> [L, D]."""
        out: Tensor = self.layers(self.norm(text)) + self.origin
        return out


class WaverDiT(nn.Module):
    """Predicts the velocity of every latent cell from noisy latents, conditions, text and timestep."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.sequence_group: SequenceGroup | None = None
        """Workers that compute every batch together with this one; all of them call the model with the same samples."""
        width = config.width
        self.video_in = nn.Linear(config.in_features, width)
        self.positions = FactorisedPositions(config.max_grid, width)
        self.text_in = nn.ModuleList(TextProjection(dim, width) for dim in config.text_dims)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.dual_blocks = nn.ModuleList(DualBlock(config) for _ in range(config.dual_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.video_out = nn.Linear(width, config.out_features)
        self.reset_parameters()

    def blocks(self) -> list[nn.Module]:
        """All blocks in order, dual ones first."""
        return [*self.dual_blocks, *self.single_blocks]

    def reset_parameters(self) -> None:
        """Start values; every block starts as the identity, and the prediction at zero."""
        for block in self.blocks():
            self.reset_block(block)
        self.reset_ends()

    def reset_block(self, block: nn.Module) -> None:
        """Start values of one block."""
        initialise(block)

    def reset_ends(self) -> None:
        """Start values of all that lies before and after the blocks."""
        for name, child in self.named_children():
            if name not in ("dual_blocks", "single_blocks"):
                initialise(child, zero=name in ("final_modulation", "video_out"))
        self.positions.reset_parameters()
        for projection in self.text_in:
            nn.init.zeros_(projection.origin)

    def forward(
        self, patches: Tensor, texts: Sequence[Tensor], timesteps: Tensor, layout: Layout, tap: int | None = None
    ) -> DiTOutput:
        """One pass over a flat batch of S samples.

        patches: [N, 144], `patchify` of [36, T, h, w] of each sample; texts: for every text encoder the vectors [L_e, dim_e] of
        all samples, one after another; timesteps: fp32 [S] in [0, 1]; tap: number of a block, from 1, whose video tokens
        are wanted (§4.2).
        """
        self._check(layout)
        if tap is not None and not 1 <= tap <= self.config.blocks:
            raise UserError(f"block {tap} of {self.config.blocks} cannot be tapped: count from 1 (alignment.block of the recipe)")
        dtype = self.video_in.weight.dtype  # bf16 where weights are; inputs come in fp32, and timesteps and angles stay so
        patches, texts = patches.to(dtype), [text.to(dtype) for text in texts]
        time = F.silu(self.time_in(timestep_features(timesteps).to(patches.dtype)))
        video = self.video_in(layout.own_video(patches)) + self.positions(layout.positions).to(patches.dtype)
        text = layout.own_text(self._text(texts, layout))
        rope = self._rope(layout)
        plans = [layout.plan(self.config.attention_kind(i)) for i in range(self.config.blocks)]
        tapped = None

        for number, block in enumerate(self.dual_blocks, 1):
            text, video = block(text, video, time, layout, rope, plans[number - 1])
            if number == tap:
                tapped = video

        joint = layout.join(text, video)
        for number, block in enumerate(self.single_blocks, self.config.dual_blocks + 1):
            joint = block(joint, time, layout, rope, plans[number - 1])
            if number == tap:
                tapped = layout.split(joint)[1]
        video = layout.split(joint)[1]

        shift, scale = self.final_modulation(time).chunk(2, dim=-1)
        out = self.video_out(modulated(self.final_norm(video), shift, scale, layout.video))
        return DiTOutput(layout.whole_video(out), None if tapped is None else layout.whole_video(tapped))

    def velocity(
        self, latents: Sequence[Tensor], texts: Sequence[Sequence[Tensor]], timesteps: Tensor, tap: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The same for samples: inputs [36, T, h, w] each, texts[sample][encoder] [L, dim] -> velocities [16, T, h, w] each,
        and what was tapped."""
        shapes = [LatentShape(*x.shape[1:]) for x in latents]
        lengths = tuple(tuple(len(t) for t in sample) for sample in texts)
        layout = _layout(tuple(shapes), lengths, latents[0].device, self.sequence_group)
        flat = [torch.cat([sample[e] for sample in texts]) for e in range(len(self.text_in))]
        out = self(patchify(latents), flat, timesteps, layout, tap)
        return unpatchify(out.patches, shapes), out.tapped

    def _text(self, texts: Sequence[Tensor], layout: Layout) -> Tensor:
        """Every encoder's tokens, projected, and sorted so that a sample's stand together."""
        projected = [project(t) for project, t in zip(self.text_in, texts, strict=True)]
        if len(projected) == 1:
            return projected[0]
        parts = [p.split([lengths[e] for lengths in layout.text_lengths]) for e, p in enumerate(projected)]
        return torch.cat([parts[e][s] for s in range(len(layout.shapes)) for e in range(len(parts))])

    def _rope(self, layout: Layout) -> Rope:
        angles = rope_angles(layout.positions, self.config.rope_dims, self.config.rope_theta)
        joint = layout.join(angles.new_zeros(layout.text.total, angles.shape[1]), angles)
        return Rope(joint.cos()[:, None], joint.sin()[:, None])

    def _check(self, layout: Layout) -> None:
        for shape in layout.shapes:
            for axis, most in zip(shape.grid, self.config.max_grid, strict=True):
                if axis > most:
                    raise UserError(
                        f"{shape.pixels} makes {shape.grid} tokens; this model's position tables hold {self.config.max_grid} "
                        "along time, height and width: shorten or shrink the video, or raise model.overrides.max_grid and train"
                    )


@lru_cache(maxsize=16)
def _layout(
    shapes: tuple[LatentShape, ...],
    text_lengths: tuple[tuple[int, ...], ...],
    device: torch.device,
    group: SequenceGroup | None,
) -> Layout:
    """Batches of a shape come again and again: what is known of their tokens is made once."""
    return Layout(shapes, text_lengths, device, group)
