"""Features of Qwen2.5-VL from a small random checkpoint on disk: the library's own, laid out on their grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.waver_core.backends_pretrained import tiny_chat
from waver_core.errors import BackendUnavailable, ConfigError
from waver_core.registry import create

pytestmark = pytest.mark.models


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return tiny_chat.save_qwen_vl(tmp_path / "qwen-vl")


def build(checkpoint: str, **options: Any) -> Any:
    return create("feature_extractor", "qwen2_5_vl", checkpoint=checkpoint, device="cpu", **options)


def test_features_are_what_the_language_model_is_shown(checkpoint: str) -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    clip = tiny_chat.clip(0, frames=6).rgb
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint).video_processor
    inputs = processor(videos=[list(clip)], return_tensors="pt", input_data_format="channels_last")
    with torch.inference_mode():
        shown = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output[0]
    t, h, w = inputs["video_grid_thw"][0].tolist()
    assert (t, h, w) == (3, 4, 6)
    (features,) = build(checkpoint).extract([clip], [(3, 2, 3)])
    assert features.shape == (3, 2, 3, 32) and features.dtype == np.float32
    np.testing.assert_allclose(features.reshape(-1, 32), shown.numpy(), atol=1e-5)


def test_cells_stand_where_they_are_in_the_picture(checkpoint: str) -> None:
    extractor, clip = build(checkpoint), tiny_chat.clip(0, frames=4).rgb
    changed = clip.copy()
    changed[2:, 28:, 56:] = 255
    difference = np.abs(extractor.native(changed).numpy() - extractor.native(clip).numpy()).max(axis=-1)
    assert np.unravel_index(difference.argmax(), difference.shape) == (1, 1, 2)
    assert difference[0].max() == 0  # pairs of frames do not see one another


def test_the_wanted_grid_is_reached_by_trilinear_interpolation(checkpoint: str) -> None:
    extractor = build(checkpoint)
    clips = [tiny_chat.clip(0, frames=5).rgb, tiny_chat.clip(1, frames=1).rgb]
    coarse, image = extractor.extract(clips, [(1, 1, 1), (1, 4, 6)])
    native = extractor.native(clips[0]).numpy()
    assert native.shape == (3, 2, 3, 32) and image.shape == (1, 4, 6, 32)
    # The middle of the grid [3, 2, 3]: halfway between the two rows of the middle column and pair.
    np.testing.assert_allclose(coarse[0, 0, 0], native[1, :, 1].mean(axis=0), atol=1e-5)
    assert extractor.dim == 32


def test_frames_larger_than_max_pixels_are_made_smaller(checkpoint: str) -> None:
    clip = tiny_chat.clip(0, frames=2).rgb
    small = build(checkpoint, max_pixels=56 * 56)
    assert small.native(clip).shape == (1, 1, 2, 32)
    assert small.fingerprint != build(checkpoint).fingerprint
    with pytest.raises(ConfigError, match="max_pixels"):
        build(checkpoint, max_pixels=-1)


def test_the_published_layout_of_weights_loads_too(checkpoint: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    clip = tiny_chat.clip(0, frames=2).rgb
    (expected,) = build(checkpoint).extract([clip], [(1, 2, 3)])
    for prefix in ("visual.", "model.visual."):
        folder = tmp_path / prefix
        folder.mkdir()
        for file in Path(checkpoint).iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        weights = load_file(Path(checkpoint) / "model.safetensors")
        renamed = {name.removeprefix("model.").replace("visual.", prefix, 1): value for name, value in weights.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        (found,) = build(str(folder)).extract([clip], [(1, 2, 3)])
        np.testing.assert_array_equal(found, expected)


def test_what_is_missing_is_named_with_its_remedy(checkpoint: str, check_missing: Callable) -> None:
    from safetensors.torch import load_file, save_file

    clip = tiny_chat.clip(0, frames=2).rgb
    missing = create("feature_extractor", "qwen2_5_vl", device="cpu")
    check_missing(missing, lambda: missing.extract([clip], [(1, 1, 1)]))
    weights = Path(checkpoint) / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "merger" not in k}, weights, {"format": "pt"})
    with pytest.raises(BackendUnavailable, match=r"no weights of a Qwen2\.5-VL visual tower"):
        build(checkpoint).extract([clip], [(1, 1, 1)])
