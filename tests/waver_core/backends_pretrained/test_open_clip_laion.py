"""LAION aesthetics from a small random CLIP in open_clip's layout and random heads: the published recipe's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from waver_core.backends.contracts import AestheticScorer
from waver_core.backends.embedded.photographic import Photographic
from waver_core.backends.pretrained.open_clip_laion import HEADS
from waver_core.errors import ConfigError
from waver_core.registry import create

pytestmark = pytest.mark.models


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """The layout of timm/vit_large_patch14_clip_224.openai with embeddings as wide, and else much smaller."""
    folder = tmp_path / "vit_tiny.openai"
    folder.mkdir()
    model_cfg = {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    statistics = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": statistics}))
    model = open_clip.model.CLIP(**model_cfg, quick_gelu=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def save_head(name: str) -> nn.Module:
    """A random head as its authors save it, written where the fetch command puts it."""
    if name.startswith("v1"):
        module: nn.Module = nn.Linear(768 if name.endswith("l14") else 512, 1)
    else:
        sizes, drops = (768, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1, None, None)
        layers: list[nn.Module] = []
        for size, following, drop in zip(sizes, sizes[1:], drops, strict=False):
            layers += [nn.Linear(size, following), *([nn.Dropout(drop)] if drop else [])]
        module = nn.Module()
        module.layers = nn.Sequential(*layers)
        module.forward = module.layers.forward  # type: ignore[method-assign]
        assert {n.split(".")[1] for n in module.state_dict()} == {"0", "2", "4", "6", "7"}
    path = HEADS[name].folder / str(HEADS[name].url).rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    torch.save(module.state_dict(), path)
    return module.eval()


@pytest.mark.parametrize("head", ["v1_l14", "v2_l14"])
def test_scores_are_the_head_s_of_unit_embeddings(clip_folder: Path, frames: np.ndarray, head: str) -> None:
    module = save_head(head)
    scorer = create("aesthetic_scorer", "open_clip_laion", checkpoint=str(clip_folder), head=head, device="cpu", batch_size=2)
    assert isinstance(scorer, AestheticScorer)
    found = scorer.score(frames)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}", force_quick_gelu=True)
    with torch.inference_mode():
        embeddings = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(f)) for f in frames]), normalize=True)
        expected = module(embeddings)[:, 0].numpy()
    assert found.score.dtype == np.float32 and found.score.shape == (5,) and np.ptp(expected) > 1e-5
    np.testing.assert_allclose(found.score, expected, atol=1e-5)
    singles = np.concatenate([scorer.score(f[None]).score for f in frames])
    np.testing.assert_allclose(found.score, singles, atol=1e-5)
    photographic = Photographic().score(frames).parts
    assert found.parts.keys() == photographic.keys()
    np.testing.assert_array_equal(found.parts["sharpness"], photographic["sharpness"])


def test_openai_s_weights_run_with_openai_s_gelu(clip_folder: Path, frames: np.ndarray) -> None:
    save_head("v1_l14")
    other = clip_folder.with_name("vit_tiny.laion2b")
    clip_folder.rename(other)
    scores: dict[str, Any] = {}
    for folder in (other, clip_folder):
        if not folder.exists():
            other.rename(folder)
        scorer = create("aesthetic_scorer", "open_clip_laion", checkpoint=str(folder), head="v1_l14", device="cpu")
        scores[folder.suffix] = scorer.score(frames).score
    assert np.abs(scores[".openai"] - scores[".laion2b"]).max() > 1e-6


def test_a_head_for_another_width_is_refused(clip_folder: Path, frames: np.ndarray) -> None:
    save_head("v1_b32")
    scorer = create("aesthetic_scorer", "open_clip_laion", checkpoint=str(clip_folder), head="v1_b32", device="cpu")
    with pytest.raises(ConfigError, match=r"wants embeddings of 512.*gives 768"):
        scorer.score(frames)


def test_options_and_what_is_missing(clip_folder: Path, frames: np.ndarray, check_missing: Callable) -> None:
    scorer = create("aesthetic_scorer", "open_clip_laion", device="cpu")
    check_missing(scorer, lambda: scorer.score(frames))
    assert [c.repo for c in scorer.checkpoints()] == ["timm/vit_large_patch14_clip_224.openai", "laion/aesthetic-v2-l14"]
    with pytest.raises(ConfigError, match="did you mean"):
        create("aesthetic_scorer", "open_clip_laion", head="v2_b32")
    assert scorer.fingerprint != create("aesthetic_scorer", "open_clip_laion", head="v1_l14").fingerprint
