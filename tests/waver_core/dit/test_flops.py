"""Counted operations against torch's own counter on the real model, and against what is known of large ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import waver_core.dit.attention as attention_module
from waver_core.dit import DiTConfig, Layout, WaverDiT, preset
from waver_core.dit.flops import attention_pairs, step_flops
from waver_core.shapes import LatentShape, VideoShape

WIDE = LatentShape(3, 6, 10)
SHAPES = {
    "uniform": ([WIDE, WIDE], [[5, 2], [5, 2]]),
    "packed": ([LatentShape(1, 8, 8), WIDE, LatentShape(5, 5, 7)], [[5, 2], [1, 9], [4, 4]]),
    "no text of one encoder": ([WIDE], [[6, 0]]),
}


@pytest.fixture(autouse=True)
def _unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU unequal segments are padded to one another; without that the kernel sees the very pairs that are counted."""
    monkeypatch.setattr(attention_module, "MAX_PADDING", 1.0)
    attention_module.groups_of_like_length.cache_clear()


@pytest.mark.parametrize("windowed", [False, True], ids=["full", "windowed"])
@pytest.mark.parametrize("case", SHAPES)
def test_torch_counts_the_same(case: str, windowed: bool) -> None:
    config = DiTConfig(2, 5, heads=2, head_dim=8, text_dims=(12, 20), max_grid=(8, 8, 8), windowed=windowed, full_blocks=1)
    shapes, texts = SHAPES[case]
    model = WaverDiT(config)
    inputs = [torch.randn(config.in_channels, *shape) for shape in shapes]
    vectors = [[torch.randn(n, dim) for n, dim in zip(sample, config.text_dims, strict=True)] for sample in texts]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.velocity(inputs, vectors, torch.full((len(shapes),), 0.5))
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attended = sum(n for op, n in counted.items() if "attention" in op)
    told = step_flops(config, shapes, texts)
    assert told.attention == attended > 0
    assert told.linear + told.modulation + told.embedding == sum(counted.values()) - attended > 0


def test_backward_is_twice_the_forward() -> None:
    """Of the blocks' matrix products; the first layers need no gradient of their inputs."""
    config = DiTConfig(1, 1, heads=2, head_dim=8, text_dims=(12,), max_grid=(8, 8, 8))
    model = WaverDiT(config)
    with FlopCounterMode(display=False) as counter:
        out, _ = model.velocity([torch.randn(config.in_channels, *WIDE)], [[torch.randn(4, 12)]], torch.tensor([0.5]))
        out[0].sum().backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    told = step_flops(config, [WIDE], [4])
    first = 2 * (WIDE.tokens * config.in_features + 4 * 12 + 256) * config.width
    assert sum(counted.values()) == 3 * (told.linear + told.modulation + told.embedding) - first


@given(
    st.tuples(st.integers(1, 9), st.integers(2, 20), st.integers(2, 20)), st.integers(0, 40), st.sampled_from(["space", "time"])
)
def test_pairs_of_windows(shape: tuple[int, int, int], text: int, kind: str) -> None:
    latent = LatentShape(*shape)
    assert attention_pairs(latent, text, kind) == Layout([latent], [[text]]).plan(kind).pairs()
    assert attention_pairs(latent, text, kind) <= attention_pairs(latent, text, "full") == (latent.tokens + text) ** 2


def test_text_given_as_one_number() -> None:
    config = preset("tiny", text_dims=(32, 32))
    assert step_flops(config, [WIDE], [9]) == step_flops(config, [WIDE], [(5, 4)])
    with pytest.raises(ValueError, match="1 text lengths for 2 encoders"):
        step_flops(config, [WIDE], [(9,)])
    with pytest.raises(ValueError, match="1 videos and 2 texts"):
        step_flops(config, [WIDE], [9, 9])


def test_six_per_weight_and_token() -> None:
    """A token passes every weight of a single block once, and of a dual block half of them: its own stream's."""
    config = preset("waver_12b")
    shape = VideoShape(121, 720, 1280).latent
    assert shape.tokens == 111_600
    told = step_flops(config, [shape], [512])
    weights = (16 + 40) * (4 + 8) * 3072**2  # without modulations and biases
    assert 3 * told.linear == 6 * weights * (111_600 + 512)
    # Attention costs a block as much as its matrices at 6 x 3,072 tokens, so here 6 times as much.
    assert told.attention / told.linear == pytest.approx(112_112 / (6 * 3072), rel=1e-12)
    assert (told.modulation + told.embedding) / told.forward < 0.002


def test_windows_of_the_refiner_save() -> None:
    """§2.2: half and quarter windows in the 40 blocks between the first and last eight, for a 5 s video of 1080p."""
    shape = VideoShape(121, 1080, 1920).latent
    full = step_flops(preset("waver_12b"), [shape], [512]).attention
    windowed = step_flops(preset("waver_12b", windowed=True), [shape], [512]).attention
    assert windowed / full == pytest.approx((16 + 20 / 4 + 20 / 2) / 56, rel=0.01)
