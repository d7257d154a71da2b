"""The two kinds of block (Waver §2.1, Fig. 3). Both are made of `Stream`: in a dual block text and video have one each and
meet in attention only; in a single block they share one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from waver_core.dit.attention import AttentionPlan, attention
from waver_core.dit.config import DiTConfig
from waver_core.dit.layout import Layout, Segments
from waver_core.dit.positions import rotate


class Rope(NamedTuple):
    """Cosines and sines of every joint token's angles, fp32 [N, 1, d / 2] each; text tokens are not turned."""

    cos: Tensor
    sin: Tensor


class Modulation(NamedTuple):
    """What the timestep does to one stream: [S, D] each. A gate of 0 leaves the tokens as they are."""

    shift_attention: Tensor
    scale_attention: Tensor
    gate_attention: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def modulated(x_ND: Tensor, shift_SD: Tensor, scale_SD: Tensor, segments: Segments) -> Tensor:
    """x (1 + scale) + shift with each sample's own."""
    x, scale = segments.spread(x_ND, scale_SD)
    _, shift = segments.spread(x_ND, shift_SD)
    return torch.addcmul(shift, x, 1 + scale).view_as(x_ND)


def gated(x_ND: Tensor, update_ND: Tensor, gate_SD: Tensor, segments: Segments) -> Tensor:
    """x + gate * update with each sample's own gate."""
    update, gate = segments.spread(update_ND, gate_SD)
    return torch.addcmul(x_ND.view_as(update), gate, update).view_as(x_ND)


class Stream(nn.Module):
    """Norms, projections, MLP and modulation of one modality, or of both."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_width), nn.GELU(approximate="tanh"), nn.Linear(config.mlp_width, width)
        )

    def modulation_of(self, time_SD: Tensor) -> Modulation:
        """time [S, D], activated already -> the six vectors of each sample."""
        return Modulation(*self.modulation(time_SD).chunk(6, dim=-1))

    def project(self, x_ND: Tensor, mod: Modulation, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [N, H, d]; queries and keys are normalised over d."""
        x = modulated(self.norm_attention(x_ND), mod.shift_attention, mod.scale_attention, segments)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, x_ND: Tensor, attended_ND: Tensor, mod: Modulation, segments: Segments) -> Tensor:
        """Residual of attention, then residual of the MLP."""
        x = gated(x_ND, self.out(attended_ND), mod.gate_attention, segments)
        hidden = modulated(self.norm_mlp(x), mod.shift_mlp, mod.scale_mlp, segments)
        return gated(x, self.mlp(hidden), mod.gate_mlp, segments)


class DualBlock(nn.Module):
    """Text and video with weights of their own, merged in attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.text = Stream(config)
        self.video = Stream(config)

    def forward(
        self, text: Tensor, video: Tensor, time_SD: Tensor, layout: Layout, rope: Rope, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """text [L, D], video [N, D] -> the same."""
        text_mod, video_mod = self.text.modulation_of(time_SD), self.video.modulation_of(time_SD)
        text_qkv = self.text.project(text, text_mod, layout.text)
        video_qkv = self.video.project(video, video_mod, layout.video)
        q, k, v = (layout.join(a, b) for a, b in zip(text_qkv, video_qkv, strict=True))
        text_out, video_out = layout.split(attention(rotate(q, *rope), rotate(k, *rope), v, plan).flatten(1))
        text = self.text.finish(text, text_out, text_mod, layout.text)
        return text, self.video.finish(video, video_out, video_mod, layout.video)


class SingleBlock(nn.Module):
    """The joint tokens of text and video through shared weights."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.stream = Stream(config)

    def forward(self, joint: Tensor, time_SD: Tensor, layout: Layout, rope: Rope, plan: AttentionPlan) -> Tensor:
        """joint [L + N, D] -> the same."""
        mod = self.stream.modulation_of(time_SD)
        q, k, v = self.stream.project(joint, mod, layout.joint)
        attended = attention(rotate(q, *rope), rotate(k, *rope), v, plan).flatten(1)
        return self.stream.finish(joint, attended, mod, layout.joint)


def initialise(module: nn.Module, *, zero: bool = False) -> None:
    """Xavier for every projection, or zeros; modulations start at zero, so that every block starts as the identity."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            if zero or name.endswith("modulation"):
                nn.init.zeros_(child.weight)
            else:
                nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.RMSNorm):
            with torch.no_grad():
                child.weight.fill_(1.0)
