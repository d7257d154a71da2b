"""Rows to frames to arrays: which frames, which part of the picture, and what a broken clip costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.frames import fit, frames_at, read_frames
from training.data.samples import build_samples
from training.data.shards import sample_of
from training.encoding import ClipEncoder
from training.recipe import Recipe
from waver_core.backends.embedded.dct_codec import DctCodec
from waver_core.errors import ConfigError, MediaError
from waver_core.video import open_video

MakeRecipe = Callable[..., Recipe]


def _row(uri: str, **changes: Any) -> dict[str, Any]:
    row = {"sample_id": "s", "source_uri": uri, "kind": "video", "start_s": 0.0, "fps": 8.0, "frames": 9, "captions": ["a", "b"]}
    return {**row, "height_px": 64, "width_px": 96, "active_box": None, **changes}


def _numbers(frames: np.ndarray) -> list[int]:
    """Which frames of a counted video these are, by their grey level."""
    return [round((float(np.median(frame[20:-20, 20:-20])) - 40) / 4) for frame in frames]


def _rows(curated: str, recipe: Recipe) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = build_samples([f"{curated}/tiers/{recipe.tier}"], recipe).table.to_pylist()
    return rows


# ------------------------------------------------------------------ frames


@pytest.mark.parametrize(("start_s", "fps"), [(0.0, 8.0), (0.5, 8.0), (0.5, 24.0), (0.25, 6.0), (0.5, 12.0)])
def test_frames_are_those_at_the_ticks(counted_mp4: str, start_s: float, fps: float) -> None:
    found = _numbers(read_frames(_row(counted_mp4, start_s=start_s, fps=fps)))
    assert found == [round((start_s + k / fps) * 24) for k in range(9)]


def test_between_two_frames_the_nearer_one_is_taken(counted_mp4: str) -> None:
    found = _numbers(read_frames(_row(counted_mp4, start_s=0.5, fps=10.0)))
    assert found == [round(24 * (0.5 + k / 10)) for k in range(9)]


def test_a_variable_rate_keeps_its_pace(tmp_path: Path, make_video: Any, make_frame: Any) -> None:
    pts = [0, 2, 3, 10, 11, 12, 13, 20, 30, 40, 41, 42, 50]
    uri = make_video(tmp_path / "variable.mp4", [make_frame(k) for k in range(len(pts))], pts=pts, options={"bf": "0"})
    found = _numbers(read_frames(_row(uri, fps=4.8)))  # a tick every 5/24 s
    assert found == [min(range(len(pts)), key=lambda k, tick=tick: abs(pts[k] - tick)) for tick in range(0, 45, 5)]


def test_no_frame_beyond_the_window_slips_in(tmp_path: Path, make_video: Any, make_frame: Any) -> None:
    pts = [0, 4, 8, 12, 16, 20, 23, 24]
    uri = make_video(tmp_path / "cut.mp4", [make_frame(k) for k in range(len(pts))], pts=pts, options={"bf": "0"})
    with open_video(uri) as video:
        times_s = [frame.time_s for frame in frames_at(video, 4 / 24, 6.0, 4)]
    assert times_s == pytest.approx([4 / 24, 8 / 24, 12 / 24, 16 / 24])
    assert _numbers(read_frames(_row(uri, start_s=0.02, fps=9.6, frames=9)))[0] == 1  # frame 0 is nearer, but before the start


def test_a_slow_source_repeats_frames(tmp_path: Path, make_video: Any, make_frame: Any) -> None:
    uri = make_video(tmp_path / "slow.mp4", [make_frame(k) for k in range(10)], fps=5)
    assert _numbers(read_frames(_row(uri, fps=10.0, frames=9))) == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_a_clip_that_ends_early_says_so(counted_mp4: str) -> None:
    with pytest.raises(MediaError, match=r"ends after 1\.96 s") as caught:
        read_frames(_row(counted_mp4, start_s=1.5))
    assert caught.value.reason == "too_short"
    with pytest.raises(MediaError, match="has no frame there"):
        read_frames(_row(counted_mp4, start_s=9.0))


def test_the_box_is_cut_out_then_the_middle_of_the_wanted_shape() -> None:
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[10:50, 20:100] = 255  # 80 x 40 inside bars
    picture[10:50, 40:80] = (255, 0, 0)  # its middle square
    assert (fit(picture, [20, 10, 100, 50], 16, 16) == (255, 0, 0)).all()
    assert fit(picture, [20, 10, 100, 50], 16, 32).shape == (16, 32, 3)
    assert (fit(picture, [20, 10, 100, 50], 16, 32)[:, -1] == 255).all()


@pytest.mark.parametrize("box", [[0, 0, 101, 60], [5, 5, 5, 20], [-1, 0, 50, 50]])
def test_a_box_of_another_picture_is_refused(box: list[int]) -> None:
    with pytest.raises(MediaError, match="active box"):
        fit(np.zeros((60, 100, 3), np.uint8), box, 16, 16)


@given(st.integers(8, 90), st.integers(8, 90), st.integers(2, 10), st.integers(2, 10))
def test_any_picture_fits_any_size(height: int, width: int, rows: int, columns: int) -> None:
    picture = np.full((height, width, 3), 77, np.uint8)
    fitted = fit(picture, None, 8 * rows, 8 * columns)
    assert fitted.shape == (8 * rows, 8 * columns, 3)
    assert (fitted == 77).all()


def test_an_image_is_one_frame(clip_rows: list[dict[str, Any]]) -> None:
    row = _row(clip_rows[-1]["source_uri"], kind="image", frames=1, fps=0.0, height_px=64, width_px=64)
    frames = read_frames(row)
    assert frames.shape == (1, 64, 64, 3)
    assert frames[0, 32, 32].tolist() == pytest.approx([200, 40, 40], abs=3)  # the disc in the middle


# ------------------------------------------------------------------ arrays


def test_a_sample_has_what_the_recipe_needs(curated: str, encoding_recipe: MakeRecipe) -> None:
    recipe = encoding_recipe()
    encoder, codec = ClipEncoder(recipe), DctCodec()
    for row in _rows(curated, recipe):
        stored = encoder.encode([row])[0]
        assert isinstance(stored, dict)
        sample = sample_of(stored, encoder.dims)
        frames = read_frames(row)
        np.testing.assert_array_equal(sample.latents, codec.encode([frames])[0].astype(np.float16))
        if row["kind"] == "video":
            assert sample.latents.shape == (16, 3, 8, 8)
            assert sample.last_latent is not None
            np.testing.assert_array_equal(sample.last_latent, codec.encode([frames[-1:]])[0].astype(np.float16))
        else:
            assert sample.latents.shape == (16, 1, 8, 8)
            assert sample.last_latent is None
        assert sample.degraded is None and sample.features is None
        assert [tuple(v.shape[1] for v in text) for text in sample.texts] == [(16, 24), (16, 24)]
        assert stored["text_tokens"] == max(sum(len(v) for v in text) for text in sample.texts)
        assert len(sample.texts[0][0]) > len(sample.texts[1][0])  # the long caption, then the short one


def test_a_batch_gives_what_single_rows_give(curated: str, encoding_recipe: MakeRecipe) -> None:
    recipe = encoding_recipe("t2v_480p")
    encoder, rows = ClipEncoder(recipe), _rows(curated, recipe)
    assert encoder.encode(rows) == [encoder.encode([row])[0] for row in rows]


def test_a_stage_that_aligns_has_features_on_a_coarser_grid(curated: str, encoding_recipe: MakeRecipe) -> None:
    recipe = encoding_recipe("t2v_480p", "training.alignment.temporal_factor=2", "training.alignment.spatial_factor=3")
    encoder = ClipEncoder(recipe)
    shapes = {row["kind"]: row["features_shape"] for row in encoder.encode(_rows(curated, recipe)) if isinstance(row, dict)}
    dim = encoder.dims["features"]
    assert shapes == {"video": [2, 2, 2, dim], "image": [1, 2, 2, dim]}  # of 3 and 1 latent frames of 4 x 4 tokens, rounded up


def test_a_refiner_gets_degraded_latents(curated: str, encoding_recipe: MakeRecipe) -> None:
    pytest.importorskip("torch")
    recipe = encoding_recipe("refine_1080p", "training.refinement.pixel_factor=3")
    encoder = ClipEncoder(recipe)
    for row in encoder.encode(_rows(curated, recipe)):
        assert isinstance(row, dict)
        sample = sample_of(row, encoder.dims)
        assert sample.degraded is not None and sample.degraded.shape == sample.latents.shape
        detail = [float(np.abs(latents[10:, :1]).mean()) for latents in (sample.degraded, sample.latents)]
        assert detail[0] < detail[1]  # finer detail of the first frame is what the degradation takes
        np.testing.assert_allclose(sample.degraded[0], sample.latents[0], atol=0.5)  # and the mean colours stay


def test_a_broken_clip_costs_no_other(curated: str, encoding_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = encoding_recipe()
    rows = _rows(curated, recipe)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all" * 20)
    broken = [{**rows[1], "source_uri": str(tmp_path / name)} for name in ("broken.mp4", "absent.mp4")]
    encoder = ClipEncoder(recipe)
    results = encoder.encode([rows[0], broken[0], rows[1], broken[1], rows[-1]])
    assert [getattr(r, "reason", "fine") for r in results] == ["fine", "not_media", "fine", "unreadable", "fine"]
    assert results[2] == encoder.encode([rows[1]])[0]


def test_a_damaged_stretch_is_refused(counted_mp4: str, tmp_path: Path, encoding_recipe: MakeRecipe) -> None:
    data = bytearray(Path(counted_mp4).read_bytes())
    middle = data.rindex(b"mdat") + (len(data) - data.rindex(b"mdat")) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "damaged.mp4").write_bytes(data)
    result = ClipEncoder(encoding_recipe()).encode([_row(str(tmp_path / "damaged.mp4"), width_px=64, frames=13)])[0]
    assert isinstance(result, MediaError)
    assert result.reason in ("damaged", "too_short")


def test_what_the_format_cannot_hold_is_an_error_of_that_row(
    curated: str, encoding_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = encoding_recipe()
    encoder, rows = ClipEncoder(recipe), _rows(curated, recipe)[:3]
    plain, target = DctCodec.encode, read_frames(rows[1])

    def huge(self: DctCodec, clips: Any) -> list[np.ndarray]:
        return [z * 1e6 if np.array_equal(clip, target) else z for clip, z in zip(clips, plain(self, clips), strict=True)]

    monkeypatch.setattr(DctCodec, "encode", huge)
    results = encoder.encode(rows)
    assert "not finite" in str(results[1])
    assert isinstance(results[0], dict) and isinstance(results[2], dict)


def test_frames_of_large_clips_are_not_all_held_at_once(
    curated: str, encoding_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = encoding_recipe()
    encoder, rows = ClipEncoder(recipe), _rows(curated, recipe)
    whole, sizes = encoder.encode(rows), []
    plain = DctCodec.encode
    monkeypatch.setattr(DctCodec, "encode", lambda self, clips: sizes.append(len(clips)) or plain(self, clips))
    monkeypatch.setattr("training.encoding._HELD_BYTES", 2 * 9 * 64 * 64 * 3)
    assert encoder.encode(rows) == whole
    assert max(sizes) <= 3  # two videos, or one and images


def test_constants_are_the_empty_text_and_black_images(encoding_recipe: MakeRecipe) -> None:
    constants = ClipEncoder(encoding_recipe()).constants()
    assert {name: array.shape for name, array in constants.items()} == {
        "empty_text_0": (1, 16),
        "empty_text_1": (1, 24),
        "black_64x64": (16, 1, 8, 8),
    }
    assert DctCodec().decode([constants["black_64x64"]])[0].max() <= 1
    assert all(array.dtype == np.float32 for array in constants.values())


def test_an_encoder_that_is_not_there_is_named(encoding_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match="no backend 'dtc' for video_autoencoder: did you mean 'dct'"):
        ClipEncoder(encoding_recipe("t2v_192p_12fps", "training.encoders.autoencoder={backend: dtc}"))
