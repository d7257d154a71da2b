"""Untrained exports of the true architecture, base and refiner, small enough for tests of everything but what they show."""

from __future__ import annotations

from pathlib import Path

import torch

from serving.arguments import Arguments, settings_of
from serving.settings import Settings
from training.export import Facts, export
from training.job import text_dims
from training.recipe import load_recipe
from training.trainee import model_config
from waver_core.config import load_config
from waver_core.dit import WaverDiT


def write_export(folder: Path, stage: str, seed: int = 0, captions: dict[str, float] | None = None) -> str:
    """An export of a stage of the profiles embedded and tiny, with random weights that do predict something."""
    config = load_config(profiles=["embedded", "tiny"])
    if captions:  # a mapping given by --set would be merged with the profile's
        config = config.model_copy(
            update={"training": {**config.training, "data": {**config.training["data"], "captions": captions}}}
        )
    recipe = load_recipe(config, stage)
    model = model_config(recipe, text_dims(recipe))
    torch.manual_seed(seed)
    dit = WaverDiT(model)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    facts = Facts(model.to_dict(), {"autoencoder": "dct-1", "text": ["words-1", "pairs-1"], "features": None}, step=1)
    export(str(folder), dit.state_dict(), recipe, facts)
    return str(folder)


def write_settings(folder: Path, *overrides: str, refiner: bool = True) -> Settings:
    """Settings over two exports in `folder`, jobs beside them."""
    base = write_export(folder / "base", "t2v_192p_12fps")
    sharp = write_export(folder / "refiner", "refine_1080p", seed=1) if refiner else None
    sets = [f"serving.storage.folder={folder / 'jobs'}", *overrides]
    return settings_of(Arguments(profile="embedded,tiny", set=sets, base=base, refiner=sharp))
