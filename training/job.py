"""What a worker needs to know to train a stage, small enough to be sent to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.on_the_fly import ClipSamples
from training.data.samples import build_samples
from training.data.shards import EncodedSamples, check_fingerprints, describe_encoders
from training.recipe import Recipe
from waver_core.config import digest_of
from waver_core.registry import create
from waver_core.storage import join


@dataclass(frozen=True)
class SampleFacts:
    """What the trainer must know of its samples beside the rows."""

    dropped: Mapping[str, Mapping[str, int]]
    text_dims: tuple[int, ...]
    feature_dim: int | None
    encoders: Mapping[str, Any]
    """Fingerprints, as exports record them."""
    digest: str
    """Changes when any sample does: the order of training belongs to one set of samples."""

    @property
    def shared_encoders(self) -> dict[str, Any]:
        """Those that a stage must have in common with its parent: features belong to one stage only."""
        return {name: self.encoders[name] for name in ("autoencoder", "text")}


@dataclass(frozen=True)
class Job:
    """One stage of one run."""

    recipe: Recipe
    output: str
    """Folder of the run; the stage has one of its name in it."""
    samples: str | None
    """Folder of encoded samples; None encodes while training."""
    curated: tuple[str, ...] = ()
    """Funnel outputs to encode from, where `samples` is None."""
    parent: str | None = None
    """Export to start from."""

    @property
    def folder(self) -> Path:
        """Metrics, checkpoints, samples and export of the stage."""
        return Path(self.output) / self.recipe.stage

    @property
    def export_folder(self) -> Path:
        """Where the finished weights go."""
        return self.folder / "export"

    def open_samples(self) -> tuple[EncodedSamples | ClipSamples, SampleFacts]:
        """The samples, and what is known of them. Raises `UserError` where they are missing or of other encoders."""
        if self.samples is not None:
            encoded = EncodedSamples(self.samples)
            check_fingerprints(encoded.index, self.recipe)
            dims = encoded.index["dims"]
            made, digest = encoded.index["encoders"], encoded.index["sample_digest"]
            return encoded, SampleFacts(encoded.index["dropped"], tuple(dims["text"]), dims.get("features"), made, digest)
        built = build_samples([join(folder, "tiers", self.recipe.tier) for folder in self.curated], self.recipe)
        made, digest = describe_encoders(self.recipe), digest_of([built.table["sample_id"].to_pylist(), self.recipe.stage])
        dims = (text_dims(self.recipe), feature_dim(self.recipe))
        return ClipSamples(built.table, self.recipe), SampleFacts(built.dropped, *dims, made, digest)


def text_dims(recipe: Recipe) -> tuple[int, ...]:
    """Widths of the text encoders; loads no weights."""
    return tuple(create("text_encoder", t.backend, **t.options).dim for t in recipe.encoders.text)


def feature_dim(recipe: Recipe) -> int | None:
    """Width of the semantic features, for stages with alignment."""
    features = recipe.encoders.features
    return create("feature_extractor", features.backend, **features.options).dim if recipe.align and features else None
