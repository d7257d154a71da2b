"""Rows of the sample table -> what the model is trained on: latents, text vectors, features (Waver §2, §4.2). Free of Ray.

`training/encode.py` stores what comes out in shards; `training.data.on_the_fly` hands the same to the trainer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from training.data.frames import read_frames
from training.data.shards import DTYPE
from training.recipe import Backend, Recipe
from waver_core.isolation import isolated, one_by_one
from waver_core.registry import create
from waver_core.shapes import LATENT_CHANNELS, LatentShape, VideoShape

Row = dict[str, Any]
_HELD_BYTES = 512 << 20
"""Frames that are held at once; a clip that is larger comes alone."""


class ClipEncoder:
    """Encodes samples of one recipe. Cheap to build; encoders load their weights at the first use, inside the worker."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises `ConfigError` where the recipe names an encoder that there is not."""
        self._recipe = recipe
        self._autoencoder = _build("video_autoencoder", recipe.encoders.autoencoder)
        self._text = [_build("text_encoder", backend) for backend in recipe.encoders.text]
        self._features = (
            _build("feature_extractor", recipe.encoders.features) if recipe.align and recipe.encoders.features else None
        )

    @property
    def dims(self) -> dict[str, Any]:
        """Widths of the vectors: {text: [dim of each encoder], features: dim or None}."""
        return {"text": [int(e.dim) for e in self._text], "features": int(self._features.dim) if self._features else None}

    @property
    def recipe(self) -> Recipe:
        """What is encoded for."""
        return self._recipe

    @property
    def constant_names(self) -> list[str]:
        """Names in `constants`."""
        sizes = dict.fromkeys((*self._recipe.video_sizes, *self._recipe.image_sizes))
        texts = [f"empty_text_{k}" for k in range(len(self._recipe.encoders.text))]
        return [*texts, *(f"black_{height}x{width}" for height, width in sizes)]

    def constants(self) -> dict[str, np.ndarray]:
        """What all samples share: `empty_text_K` [L, dim] of each text encoder, and `black_HxW` [16, 1, h, w], the latents of
        a black image of each pixel size of the recipe. float32, rounded as samples are."""
        arrays = {f"empty_text_{k}": encoder.encode([""])[0] for k, encoder in enumerate(self._text)}
        for height, width in dict.fromkeys((*self._recipe.video_sizes, *self._recipe.image_sizes)):
            arrays[f"black_{height}x{width}"] = self._autoencoder.encode([np.zeros((1, height, width, 3), np.uint8)])[0]
        return {name: array.astype(DTYPE).astype(np.float32) for name, array in arrays.items()}

    def encode(self, rows: Sequence[Row]) -> list[Row | Exception]:
        """Each row with its arrays as a shard stores them, or what went wrong with it; one broken clip costs no other.

        Adds latents, last_latent, degraded, features (bytes or None), features_shape, text_K (bytes per caption) and
        text_tokens, the most that a caption has over all encoders. A `UserError`, such as a missing weight, is raised.
        """
        return [result for part in _parts(rows) for result in self._encode(part)]

    def text_tokens(self, captions: Sequence[Sequence[str]]) -> list[int]:
        """For each row's captions the number of tokens of the longest, over all encoders together."""
        vectors = self._text_vectors(captions)
        return [_most_tokens(_texts_of(row, vectors)) for row in captions]

    def _encode(self, rows: Sequence[Row]) -> list[Row | Exception]:
        work: list[Row | Exception] = [
            frames if isinstance(frames, Exception) else {"row": row, "frames": frames}
            for row, frames in zip(rows, one_by_one(read_frames, rows))
        ]
        _add(work, "latents", lambda items: self._latents([item["frames"] for item in items]))
        last = [k for k, item in enumerate(work) if not isinstance(item, Exception) and item["row"]["kind"] == "video"]
        _add(work, "last_latent", lambda items: self._latents([item["frames"][-1:] for item in items]), last)
        if self._recipe.task == "refine":
            _add(work, "degraded", lambda items: self._latents([self._degraded(item["frames"]) for item in items]))
        if self._features is not None:
            _add(work, "features", self._extracted)
        vectors = self._text_vectors([item["row"]["captions"] for item in work if not isinstance(item, Exception)])
        _add(work, "texts", lambda items: [_texts_of(item["row"]["captions"], vectors) for item in items])
        return [item if isinstance(item, Exception) else _stored(item) for item in work]

    def _latents(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] each -> fp16 [16, 1+k, h, w]."""
        latents = self._autoencoder.encode(clips)
        for clip, latent in zip(clips, latents, strict=True):
            wanted = (LATENT_CHANNELS, *VideoShape(*clip.shape[:3]).latent)
            if latent.shape != wanted:
                raise ValueError(f"the autoencoder made latents of {list(latent.shape)}, not {list(wanted)}")
        return [_rounded(latent, "latents") for latent in latents]

    def _degraded(self, frames: np.ndarray) -> np.ndarray:
        from waver_core.flow.degradation import degrade_pixels  # brings torch, which other stages can do without

        return degrade_pixels(frames, self._recipe.refinement.pixel_factor)

    def _extracted(self, items: Sequence[Row]) -> list[np.ndarray]:
        """Features fp16 [Tf, Hf, Wf, dim] on a grid coarser than the tokens' (Waver §4.2)."""
        assert self._features is not None
        grids = [self.feature_grid(VideoShape(*item["frames"].shape[:3]).latent) for item in items]
        return [_rounded(array, "features") for array in self._features.extract([item["frames"] for item in items], grids)]

    def feature_grid(self, latent: LatentShape) -> tuple[int, int, int]:
        """Cells of the features along time, height and width: tokens divided by the recipe's factors, rounded up."""
        frames, rows, columns = latent.grid
        time, space = self._recipe.alignment.temporal_factor, self._recipe.alignment.spatial_factor
        return -(-frames // time), -(-rows // space), -(-columns // space)

    def _text_vectors(self, captions: Sequence[Sequence[str]]) -> list[dict[str, np.ndarray | Exception]]:
        """Per encoder: caption -> fp16 [L, dim], or why there is none. A caption that several rows have is encoded once."""
        distinct = list(dict.fromkeys(caption for row in captions for caption in row))
        found = []
        for encoder in self._text:

            def encode(texts: Sequence[str], encoder: Any = encoder) -> list[np.ndarray]:
                return [_rounded(vectors, "text vectors") for vectors in encoder.encode(texts)]

            found.append(dict(zip(distinct, isolated(encode, distinct), strict=True)))
        return found


def _build(capability: str, chosen: Backend) -> Any:
    return create(capability, chosen.backend, **chosen.options)


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows in order, cut so that the frames of a part stay within `_HELD_BYTES`."""
    part: list[Row] = []
    held = 0
    for row in rows:
        size = row["frames"] * row["height_px"] * row["width_px"] * 3
        if part and held + size > _HELD_BYTES:
            yield part
            part, held = [], 0
        part.append(row)
        held += size
    if part:
        yield part


def _add(
    work: list[Row | Exception],
    name: str,
    call: Callable[[Sequence[Row]], Sequence[Any]],
    only: Sequence[int] | None = None,
) -> None:
    """Put a result of `call` into every item that has not failed yet, or the error in its place."""
    chosen = [k for k in (range(len(work)) if only is None else only) if not isinstance(work[k], Exception)]
    items: list[Row] = [work[k] for k in chosen]  # type: ignore[misc]  # those that are no exceptions
    for k, item, result in zip(chosen, items, isolated(call, items), strict=True):
        if isinstance(result, Exception):
            work[k] = result
        else:
            item[name] = result


def _texts_of(captions: Sequence[str], vectors: Sequence[Mapping[str, Any]]) -> list[list[np.ndarray]]:
    """Per encoder the vectors of a row's captions; raises what kept one from being encoded."""
    texts = [[found[caption] for caption in captions] for found in vectors]
    for array in (array for column in texts for array in column):
        if isinstance(array, Exception):
            raise array
    return texts


def _most_tokens(texts: Sequence[Sequence[np.ndarray]]) -> int:
    return max(sum(len(vectors) for vectors in caption) for caption in zip(*texts, strict=True))


def _rounded(array: np.ndarray, what: str) -> np.ndarray:
    """The array as it is stored; raises `ValueError` where it has values that the format cannot hold."""
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array, dtype=DTYPE)
    if not np.isfinite(stored).all():
        raise ValueError(f"the {what} are not finite in {DTYPE}")
    return stored


def _stored(item: Row) -> Row:
    """The row with its arrays as bytes."""
    features = item.get("features")
    return {
        **item["row"],
        **{name: item[name].tobytes() if name in item else None for name in ("latents", "last_latent", "degraded", "features")},
        "features_shape": None if features is None else list(features.shape),
        **{f"text_{k}": [vectors.tobytes() for vectors in column] for k, column in enumerate(item["texts"])},
        "text_tokens": _most_tokens(item["texts"]),
    }
