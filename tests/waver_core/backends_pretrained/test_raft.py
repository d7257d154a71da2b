"""RAFT from random weights on disk: torchvision's own numbers, at any size of frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import optical_flow
from torchvision.transforms._presets import OpticalFlow

from waver_core.backends.contracts import FlowEstimator
from waver_core.backends.pretrained.raft import CHECKPOINTS
from waver_core.errors import ConfigError
from waver_core.registry import create

pytestmark = pytest.mark.models


def save_weights(models: Path, variant: str) -> torch.nn.Module:
    """A random RAFT, written where the fetch command puts torchvision's file."""
    model = getattr(optical_flow, f"raft_{variant}")(weights=None).eval()
    path = CHECKPOINTS[variant].folder / str(CHECKPOINTS[variant].url).rsplit("/", 1)[-1]
    assert path.is_relative_to(models)
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    return model


@pytest.mark.parametrize("variant", ["small", "large"])
def test_flow_equals_torchvision_s(models_folder: Path, variant: str) -> None:
    model = save_weights(models_folder, variant)
    frames = np.random.default_rng(1).integers(0, 256, (3, 128, 136, 3)).astype(np.uint8)
    estimator = create("flow_estimator", "raft", variant=variant, iterations=2, device="cpu")
    assert isinstance(estimator, FlowEstimator)
    flow = estimator.flow(frames)
    pair = OpticalFlow()(*(torch.from_numpy(f).permute(0, 3, 1, 2) for f in (frames[:-1], frames[1:])))
    with torch.inference_mode():
        expected = model(*pair, num_flow_updates=2)[-1].permute(0, 2, 3, 1).numpy()
    assert flow.dtype == np.float32 and flow.shape == (2, 128, 136, 2)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(flow, expected, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 80), (80, 64), (130, 140)])
def test_every_pair_has_a_field_of_the_frames_size(models_folder: Path, height: int, width: int) -> None:
    save_weights(models_folder, "small")
    frames = np.random.default_rng(2).integers(0, 256, (4, height, width, 3)).astype(np.uint8)
    estimator = create("flow_estimator", "raft", iterations=1, device="cpu", batch_size=2)
    flow = estimator.flow(frames)
    assert flow.shape == (3, height, width, 2) and np.isfinite(flow).all()
    single = np.concatenate([estimator.flow(frames[t : t + 2]) for t in range(3)])
    np.testing.assert_allclose(flow, single, atol=1e-3)
    assert estimator.flow(frames[:1]).shape == (0, height, width, 2)


def test_flow_of_an_enlarged_frame_comes_back_in_the_frame_s_own_pixels(models_folder: Path) -> None:
    estimator = create("flow_estimator", "raft", device="cpu")

    class Steady(torch.nn.Module):
        """Finds (16, 8) px everywhere, in the pixels of what it is given; keeps the size of that."""

        def forward(self, a: torch.Tensor, b: torch.Tensor, num_flow_updates: int) -> list[torch.Tensor]:
            assert min(a.shape[-2:]) >= 128 and a.shape[-2] % 8 == a.shape[-1] % 8 == 0
            assert a.min() >= -1 and a.max() <= 1
            self.size = tuple(a.shape[-2:])
            return [torch.tensor([16.0, 8.0]).view(1, 2, 1, 1).expand(len(a), 2, *self.size)]

    estimator._model = steady = Steady()
    flow = estimator.flow(np.zeros((2, 32, 65, 3), np.uint8))
    assert steady.size == (128, 264)
    np.testing.assert_allclose(flow, np.broadcast_to([4.0, 2.0], flow.shape), rtol=1e-5)


def test_known_weights_are_torchvision_s_own() -> None:
    enums = {"small": optical_flow.Raft_Small_Weights.C_T_V2, "large": optical_flow.Raft_Large_Weights.C_T_V2}
    assert {n: c.url for n, c in CHECKPOINTS.items()} == {n: e.url for n, e in enums.items()}


def test_options_and_what_is_missing(frames: np.ndarray, check_missing: Callable) -> None:
    estimator = create("flow_estimator", "raft", device="cpu")
    check_missing(estimator, lambda: estimator.flow(frames))
    prints = {create("flow_estimator", "raft", **o).fingerprint for o in ({}, {"variant": "large"}, {"iterations": 20})}
    assert len(prints) == 3
    for wrong, says in (({"variant": "smal"}, "small"), ({"iterations": 0}, "at least 1"), ({"dtype": "int8"}, "bfloat16")):
        with pytest.raises(ConfigError, match=says):
            create("flow_estimator", "raft", **wrong)
