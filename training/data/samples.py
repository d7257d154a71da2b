"""Manifests -> the sample table of a stage: which frames of which clip, at which size, are encoded (Waver §4.1).

A pure function of metadata; no pixel is read. A clip takes the size nearest to its aspect ratio, the longest duration that it
fills, and as many windows as the recipe wants. What cannot be used is counted with the reason.

A size is the nearest by how much of the picture a crop to its ratio keeps; of several sizes of that ratio it is the largest
that the clip fills without more enlargement than allowed. Sizes are multiples of 8 px, so a file of the same name may fall
short by a little (480p: 854 px for 864): enlargement up to 4 % above `max_upscale` is rounding and does not count.

Frames lie 1/fps apart, each standing for that time, and all of it lies within the clip. Of n windows, number k begins at
(k + 1/2)/n of the time to spare (a single one lies in the middle, away from the cuts), at a frame of the source. Windows are
alternatives of one clip: its sampling weight is divided among them, so that an epoch counts clips, as Table 2 does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.data.counter_hash import hash_strings, hex_ids
from training.data.tier_tables import read_clips, read_indices
from training.recipe import Recipe, Size
from waver_core.errors import UserError

KINDS = ("video", "image")
MENDS = {
    "no_caption": "data.captions",
    "unknown_size": "the curation that left width_px or height_px empty",
    "frame_rate": "the stage's fps",
    "too_short": "data.seconds",
    "aspect_ratio": "data.min_kept_area or the stage's resolution",
    "too_small": "data.max_upscale or the stage's resolution",
}
"""Why a clip cannot be used, in the order asked (the first that holds is counted), and the setting that decides it."""
_ROUNDING = 1.04
_SAME_RATIO = 1.06
_SAME_TIME_S = 1e-3
_MIN_FPS = 0.9
"""A source may be slower than the wanted rate by a tenth (23.976 for 24, 15 for 16); more would repeat too many frames."""
_MIN_SOURCES = 20
"""From so many sources of a kind on, at least one is held out."""
_SIDE_LIMIT_PX = 2**20
_NARROW_ROWS = 1_000_000


class SampleTable(NamedTuple):
    """The samples of a stage, what could not be used, and what is worth recording."""

    table: pa.Table
    """A row for each sample. sample_id string, clip_id string, source_id string, source_uri string, kind string, start_s
    float64 (of the first frame to take), fps float64 (sampling rate, 0 for images), frames int32, height_px int32, width_px
    int32 (at which it is encoded), captions list<string> (in the order of data.captions), weight float64, held_out bool,
    active_box list<int32> (the picture inside black bars, as curation measured it; may be null)."""
    dropped: dict[str, dict[str, int]]
    """Kind -> reason (a key of `MENDS`) -> clips that the stage wants and cannot use."""
    facts: dict[str, Any]
    """manifests, tier, config_digests, backends, clips, duplicates, unwanted (kind -> clips of a kind or from originals of a
    size that the stage does not train on), samples, held_out_sources."""


def build_samples(manifests: Sequence[str], recipe: Recipe) -> SampleTable:
    """Read published tiers (folders `<output>/tiers/<tier>`) and choose what a stage trains on.

    The same clips give the same table, whatever the order of manifests. A clip without one of the caption columns takes the
    first that it has in its place. Raises `UserError` where a manifest is missing, belongs to another tier or was made by other
    models than the rest, where there are no rows, or none of a kind that the stage trains on can be used.
    """
    indices = read_indices(manifests, recipe)
    clips, duplicates = read_clips(indices, list(recipe.data.captions))
    if not len(clips):
        fix = f"loosen its gates (tiers.{recipe.tier} in pipelines.yaml) or add material"
        raise UserError(f"the tier '{recipe.tier}' in {', '.join(indices)} has no clips: {fix}")
    kind = {k: pc.fill_null(pc.equal(clips["kind"], k), False).to_numpy() for k in KINDS}
    sizes = {"video": recipe.video_sizes, "image": recipe.image_sizes}
    wanted = np.any([kind[k] for k in KINDS if sizes[k]], axis=0)
    if recipe.min_short_side_px:
        wanted &= _numbers(clips, "short_side_px") >= recipe.min_short_side_px
    unwanted = {k: int((kind[k] & ~wanted).sum()) for k in KINDS}
    fit = _fit(clips, kind, recipe)
    dropped = {k: _count(fit.reason[kind[k] & wanted]) for k in KINDS if sizes[k]}
    usable = wanted & (fit.reason == "")
    _refuse_nothing(kind, wanted, usable, dropped, unwanted, recipe)
    table = _assemble(clips, np.flatnonzero(usable), fit, recipe)
    facts = {
        "manifests": list(indices),
        "tier": recipe.tier,
        "config_digests": sorted({str(i.get("config_digest")) for i in indices.values()}),
        "backends": next(iter(indices.values())).get("backends", {}),
        "clips": len(clips),
        "duplicates": duplicates,
        "unwanted": unwanted,
        "samples": len(table),
        "held_out_sources": pc.count_distinct(table["source_id"].filter(table["held_out"])).as_py(),
    }
    return SampleTable(table, dropped, facts)


def check_dropped(dropped: Mapping[str, Mapping[str, int]], samples: pa.Table, recipe: Recipe) -> dict[str, float]:
    """Share of the wanted clips of each kind that cannot be used; `UserError` above `data.max_dropped_share`.

    Better asked before hours of encoding than after. The message names the kind, the share, and what decides each reason.
    """
    shares = {}
    for kind, reasons in dropped.items():
        lost = sum(reasons.values())
        used = pc.count_distinct(samples["clip_id"].filter(pc.equal(samples["kind"], kind))).as_py()
        shares[kind] = lost / (lost + used) if lost else 0.0
        if shares[kind] > recipe.data.max_dropped_share:
            head = f"stage '{recipe.stage}' cannot use {shares[kind]:.1%} of its {kind} clips ({lost} of {lost + used})"
            limit = f"data.max_dropped_share ({recipe.data.max_dropped_share:.1%})"
            raise UserError(f"{head}: {_reasons_text(reasons)}; change what decides it or raise {limit}")
    return shares


def _reasons_text(reasons: Mapping[str, int]) -> str:
    largest_first = sorted(reasons.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {reason} (see {MENDS.get(reason, 'the encoder')})" for reason, count in largest_first)


def _refuse_nothing(
    kind: Mapping[str, np.ndarray],
    wanted: np.ndarray,
    usable: np.ndarray,
    dropped: Mapping[str, Mapping[str, int]],
    unwanted: Mapping[str, int],
    recipe: Recipe,
) -> None:
    """Raises `UserError` where no clip, or no video for a stage with video, can be used."""
    needed = "video" if recipe.video_sizes else "image"
    if (usable & kind[needed]).any():
        return
    if (wanted & kind[needed]).any():
        why = _reasons_text(dropped[needed])
    elif recipe.min_short_side_px and unwanted[needed]:
        why = f"{unwanted[needed]} from originals under {recipe.min_short_side_px} px (see the stage's min_short_side_px)"
    else:
        why = f"the tier '{recipe.tier}' has none: curate some"
    raise UserError(f"stage '{recipe.stage}' can use no {needed} clip: {why}")


class _Fit(NamedTuple):
    """Per clip [N]: why it cannot be used ("" if it can), size and frames to encode, time to spare, and the source's rate."""

    reason: np.ndarray
    height_px: np.ndarray
    width_px: np.ndarray
    frames: np.ndarray
    spare_s: np.ndarray
    source_fps: np.ndarray


def _fit(clips: pa.Table, kind: Mapping[str, np.ndarray], recipe: Recipe) -> _Fit:
    n = len(clips)
    height, width = _numbers(clips, "height_px"), _numbers(clips, "width_px")
    chosen, kept, enlarged = np.zeros((n, 2), np.int32), np.zeros(n), np.full(n, np.inf)
    known = (height > 0) & (width > 0)
    for name, sizes in (("video", recipe.video_sizes), ("image", recipe.image_sizes)):
        rows = np.flatnonzero(kind[name] & known)
        if len(rows) and sizes:
            chosen[rows], kept[rows], enlarged[rows] = _nearest_sizes(height[rows], width[rows], sizes, recipe.data.max_upscale)
    fps, duration_s = _numbers(clips, "fps"), _numbers(clips, "duration_s")
    counts = np.array(recipe.frame_counts or (1,))
    rate = recipe.fps or 1.0
    filled = np.searchsorted(counts / rate, duration_s + _SAME_TIME_S, side="right") - 1
    frames = np.where(kind["video"], counts[np.maximum(filled, 0)], 1)
    spare_s = np.where(kind["video"], np.maximum(duration_s - frames / rate, 0.0), 0.0)
    failed = {
        "no_caption": _no_caption(clips, list(recipe.data.captions)),
        "unknown_size": ~known,
        "frame_rate": kind["video"] & ~(fps >= _MIN_FPS * rate),
        "too_short": kind["video"] & ((filled < 0) | np.isnan(duration_s)),
        "aspect_ratio": kept < recipe.data.min_kept_area,
        "too_small": enlarged > recipe.data.max_upscale * _ROUNDING,
    }
    reason = np.select([failed[name] for name in MENDS], list(MENDS), default="")
    return _Fit(reason, chosen[:, 0], chosen[:, 1], frames, spare_s, fps)


def _nearest_sizes(
    height: np.ndarray, width: np.ndarray, sizes: Sequence[Size], max_upscale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pictures [N]: size int32 [N, 2], share of the picture that its crop keeps, and enlargement (1: none)."""
    packed, back = np.unique(height * _SIDE_LIMIT_PX + width, return_inverse=True)
    pairs = np.stack([packed // _SIDE_LIMIT_PX, packed % _SIDE_LIMIT_PX], axis=1)
    options = np.array(sorted(sizes, key=lambda s: (s[1] / s[0], s)), np.float64)
    ratio = options[:, 1] / options[:, 0]
    family = np.cumsum(np.concatenate([[0], ratio[1:] > ratio[:-1] * _SAME_RATIO]))
    relative = (pairs[:, 1] / pairs[:, 0])[:, None] / ratio
    kept = np.minimum(relative, 1 / relative)
    enlarged = np.max(options / pairs[:, None, :], axis=2)
    same = family == family[np.argmax(kept, axis=1)][:, None]
    area = options.prod(axis=1)
    fits = same & (enlarged <= max_upscale * _ROUNDING)
    best = np.argmax(np.where(fits, area, np.where(same, -area, -np.inf)), axis=1)
    rows = np.arange(len(pairs))
    return options[best].astype(np.int32)[back], kept[rows, best][back], enlarged[rows, best][back]


def _assemble(clips: pa.Table, usable: np.ndarray, fit: _Fit, recipe: Recipe) -> pa.Table:
    """The sample table of the usable rows, windows of a clip one after the other."""
    room = np.nan_to_num(np.floor(fit.spare_s[usable] * fit.source_fps[usable]))  # a frame of the source apart at least
    windows = np.clip(room, 1, recipe.data.windows).astype(np.int64)
    rows = np.repeat(usable, windows)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(windows) - windows, windows)
    of = np.repeat(windows, windows)
    source_fps = np.where(fit.frames[rows] > 1, fit.source_fps[rows], 1.0)
    offset_s = np.floor(fit.spare_s[rows] * (number + 0.5) / of * source_fps + _SAME_TIME_S) / source_fps
    taken = clips.take(rows)
    video = fit.frames[rows] > 1
    weight = _numbers(taken, "sampling_weight")
    if not (np.isfinite(weight) & (weight >= 0)).all():
        raise UserError("clips have no sampling_weight of 0 or more: publish the tier again with curation/run_funnel.py")
    boxes = taken["technical_active_box"] if "technical_active_box" in taken.column_names else pa.nulls(len(rows))
    columns = {
        "sample_id": hex_ids(taken["clip_id"], number),
        **{name: taken[name] for name in ("clip_id", "source_id", "source_uri", "kind")},
        "start_s": _numbers(taken, "start_s") + offset_s,
        "fps": np.where(video, recipe.fps or 0.0, 0.0),
        "frames": fit.frames[rows].astype(np.int32),
        "height_px": fit.height_px[rows],
        "width_px": fit.width_px[rows],
        "captions": _captions(taken, list(recipe.data.captions)),
        "weight": weight / of,
        "held_out": _held_out(taken["source_id"], video, recipe),
        "active_box": boxes,
    }
    texts = {name: pa.string() for name in ("sample_id", "clip_id", "source_id", "source_uri", "kind")}
    lists = {"captions": pa.list_(pa.string()), "active_box": pa.list_(pa.int32())}
    wide = pa.table(columns)
    schema = pa.schema([pa.field(f.name, {**texts, **lists}.get(f.name, f.type)) for f in wide.schema])
    parts = [wide.slice(at, _NARROW_ROWS).cast(schema) for at in range(0, len(wide), _NARROW_ROWS)]
    return pa.concat_tables(parts)


def _no_caption(clips: pa.Table, names: Sequence[str]) -> np.ndarray:
    blank = [pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(clips[name], ""))), 0) for name in names]
    return np.all([b.to_numpy() for b in blank], axis=0)


def _captions(clips: pa.Table, names: Sequence[str]) -> pa.Array:
    """large_list [N] of a caption for each column; one that is missing gives way to the first that is there."""
    texts = []
    for name in names:
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(clips[name])), 0)
        texts.append(pc.if_else(blank, None, clips[name]).combine_chunks())
    texts = [pc.coalesce(text, *texts) for text in texts]
    n = len(clips)
    values = pa.concat_arrays(texts).take(pa.array((np.arange(n)[:, None] + n * np.arange(len(names))).ravel()))
    return pa.LargeListArray.from_arrays(pa.array(np.arange(n + 1) * len(names)), values)


def _held_out(source_id: pa.ChunkedArray, video: np.ndarray, recipe: Recipe) -> np.ndarray:
    """bool [N]: samples of sources that are kept for the held-out loss, by a stable hash of the source.

    A source whose hash lies below the share is held out. Of each kind never all sources are, and one at least from
    `_MIN_SOURCES` on; of more than `max_held_out` sources those with the lowest hashes stay (the first of each kind before).
    """
    encoded = source_id.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    place = hash_strings(pa.chunked_array([encoded.dictionary]), seed=3).astype(np.float64) * 2.0**-64
    shows_video = np.zeros(len(place), bool)
    shows_video[codes] = video
    candidates: list[tuple[bool, float, int]] = []
    for of_kind in (np.flatnonzero(shows_video), np.flatnonzero(~shows_video)):
        ordered = of_kind[np.argsort(place[of_kind], kind="stable")]
        share = recipe.data.held_out_share
        least = int(share > 0 and len(ordered) >= _MIN_SOURCES)
        n = min(max(int((place[ordered] < share).sum()), least), max(0, len(ordered) - 1))
        candidates += [(i > 0, float(place[code]), int(code)) for i, code in enumerate(ordered[:n])]
    held = [code for _, _, code in sorted(candidates)[: recipe.data.max_held_out]]
    chosen = np.zeros(len(place), bool)
    chosen[held] = True
    return chosen[codes]


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """float64 [N] of a column, NaN where it is null."""
    return table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)


def _count(reasons: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(reasons[reasons != ""], return_counts=True)
    return {str(reason): int(count) for reason, count in zip(found, counts)}
