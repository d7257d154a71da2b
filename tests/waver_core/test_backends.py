"""Every backend keeps its contract (shapes, types, determinism), and the embedded ones measure what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from waver_core.errors import BackendUnavailable
from waver_core.registry import backend_class, backends, create
from waver_core.synthetic import Camera, Overlay, Video, single_shot, truth

CAPABILITIES = (
    "frame_embedder",
    "flow_estimator",
    "foreground_segmenter",
    "text_detector",
    "watermark_scorer",
    "aesthetic_scorer",
)
SIZES = {"landscape": (90, 160), "portrait": (160, 90), "square": (96, 96)}
_BUILT: dict[tuple[str, str], Any] = {}


def build(capability: str, name: str) -> Any:
    """A backend, built once; skips where its packages or weights are not on this machine."""
    if (capability, name) not in _BUILT:
        try:
            _BUILT[capability, name] = create(capability, name)
        except BackendUnavailable as error:
            pytest.skip(str(error))
    return _BUILT[capability, name]


def each(capability: str) -> pytest.MarkDecorator:
    """One case for every embedded backend of a capability; those with weights have tests of their own."""
    names = [
        n for n in backends(capability) if backend_class(capability, n).__module__.startswith("waver_core.backends.embedded.")
    ]
    return pytest.mark.parametrize("backend", [pytest.param((capability, n), id=n) for n in names])


def texture(seed: int, height: int = 360, width: int = 640) -> np.ndarray:
    """A smooth random texture, uint8 [H, W, 3], over the full range of tones."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2.5), None, 0, 255, cv2.NORM_MINMAX)


def odd_frames(height: int, width: int) -> np.ndarray:
    """Black, white, noise and texture, where divisions by zero would show."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    black = np.zeros((height, width, 3), np.uint8)
    return np.stack([black, black, np.full_like(black, 255), noise, texture(1, height, width), black])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_has_an_embedded_backend_with_a_stable_fingerprint(capability: str) -> None:
    for name in backends(capability):
        built = build(capability, name)
        assert built.fingerprint and built.fingerprint == create(capability, name).fingerprint


# --- frame embedders ---------------------------------------------------------------------------------------------------


@each("frame_embedder")
@pytest.mark.parametrize("size", SIZES)
def test_embeddings_are_unit_vectors_alone_and_in_a_batch(backend: tuple[str, str], size: str) -> None:
    embedder, frames = build(*backend), odd_frames(*SIZES[size])
    vectors = embedder.embed(frames)
    assert vectors.dtype == np.float32 and vectors.ndim == 2 and len(vectors) == len(frames)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert np.array_equal(vectors, embedder.embed(frames))
    single = np.concatenate([embedder.embed(f[None]) for f in frames])
    assert np.allclose(vectors, single, atol=1e-5)
    assert embedder.short_side_px > 0


@each("frame_embedder")
def test_embeddings_tell_scenes_apart_and_forgive_a_little_noise(backend: tuple[str, str], frames_of: Callable) -> None:
    embedder = build(*backend)
    scenes = [
        single_shot(s, width_px=160, height_px=90, duration_s=0.1, colour=c) for s, c in ((1, "red"), (2, "cyan"), (3, "white"))
    ]
    frames = np.stack([frames_of(v)[0] for v in scenes])
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 4, frames.shape), 0, 255).astype(np.uint8)
    a, b = embedder.embed(frames), embedder.embed(noisy)
    same, other = np.diag(a @ b.T), (a @ a.T)[~np.eye(3, dtype=bool)]
    assert same.min() > 0.95
    assert other.max() < same.min() - 0.1


# --- flow --------------------------------------------------------------------------------------------------------------


@each("flow_estimator")
@pytest.mark.parametrize("size", SIZES)
def test_flow_has_a_field_for_every_pair(backend: tuple[str, str], size: str) -> None:
    estimator, frames = build(*backend), odd_frames(*SIZES[size])
    flow = estimator.flow(frames)
    assert flow.shape == (len(frames) - 1, *frames.shape[1:3], 2) and flow.dtype == np.float32
    assert np.isfinite(flow).all()
    assert np.array_equal(flow, estimator.flow(frames))
    assert np.array_equal(flow[3:4], estimator.flow(frames[3:5]))  # a pair does not depend on the pairs before it
    assert estimator.flow(frames[:1]).shape == (0, *frames.shape[1:3], 2)


@each("flow_estimator")
@pytest.mark.parametrize("shift", [(3.0, 0.0), (0.0, -4.0), (2.5, 1.5), (6.0, -6.0), (0.0, 0.0)])
def test_flow_of_a_shifted_texture_is_the_shift(backend: tuple[str, str], shift: tuple[float, float]) -> None:
    big = texture(1, 300, 420)
    moved = cv2.warpAffine(big, np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32), (420, 300))
    flow = build(*backend).flow(np.stack([big[40:260, 40:380], moved[40:260, 40:380]]))[0]
    error = np.linalg.norm(flow[20:-20, 20:-20] - np.array(shift), axis=2)
    assert float(error.mean()) < 0.3
    assert float(np.percentile(error, 95)) < 0.5


# --- foreground --------------------------------------------------------------------------------------------------------


@each("foreground_segmenter")
def test_foreground_is_what_has_residual_motion(backend: tuple[str, str]) -> None:
    segmenter = build(*backend)
    frames = np.stack([texture(s, 96, 160) for s in (1, 2, 3)])
    residual = np.random.default_rng(0).uniform(0, 0.2, (2, 48, 80)).astype(np.float32)
    residual[1, 10:30, 20:50] = 4.0
    residual[:, 40, 70] = 9.0  # a speck
    mask = segmenter.segment(frames, residual)
    assert mask.shape == residual.shape and mask.dtype == bool
    assert not mask[0].any()
    truth_mask = np.zeros((48, 80), bool)
    truth_mask[10:30, 20:50] = True
    assert (mask[1] & truth_mask).sum() / (mask[1] | truth_mask).sum() > 0.9
    assert np.array_equal(mask, segmenter.segment(frames, residual))


@each("foreground_segmenter")
def test_no_residual_means_no_foreground(backend: tuple[str, str]) -> None:
    frames = np.zeros((4, 96, 160, 3), np.uint8)
    assert not build(*backend).segment(frames, np.zeros((3, 48, 80), np.float32)).any()


# --- text --------------------------------------------------------------------------------------------------------------


@each("text_detector")
@pytest.mark.parametrize(("height", "width"), [(360, 640), (640, 360)])
def test_rendered_text_is_found_where_it_stands(backend: tuple[str, str], height: int, width: int) -> None:
    frame = np.full((height, width, 3), 90, np.uint8)
    (w, h), _ = cv2.getTextSize("HELLO", cv2.FONT_HERSHEY_SIMPLEX, 2, 4)
    left, base = (width - w) // 2, height // 3
    cv2.putText(frame, "HELLO", (left, base), cv2.FONT_HERSHEY_SIMPLEX, 2, (255, 255, 255), 4)
    boxes = build(*backend).detect(frame)
    assert len(boxes) == 1
    box = boxes[0]
    wanted = (left / width, (base - h) / height, (left + w) / width, base / height)
    assert np.abs(np.array(box[:4]) - wanted).max() < 0.03
    assert box.area == pytest.approx((box.right - box.left) * (box.bottom - box.top))
    assert 0 < box.score <= 1
    assert build(*backend).detect(frame) == boxes


@each("text_detector")
def test_no_text_is_found_where_there_is_none(backend: tuple[str, str], frames_of: Callable) -> None:
    detector = build(*backend)
    scene = frames_of(single_shot(3, duration_s=0.05))[0]
    for frame in (*odd_frames(180, 320)[[0, 2, 3]], scene, np.ascontiguousarray(np.rot90(scene)), texture(2)):
        assert detector.detect(frame) == []


# --- watermarks --------------------------------------------------------------------------------------------------------


def logo_clip(seed: int, *, logo: bool, camera: str = "pan_right", size: tuple[int, int] = (320, 180)) -> Video:
    """20 frames under a quick pan, with or without a logo in the corner."""
    video = single_shot(seed, camera=Camera(camera, 0.3), width_px=size[0], height_px=size[1], duration_s=2.5, fps=8)
    return replace(video, overlays=(Overlay("logo", (), "top_left", 0.16, 0.9),) if logo else ())


@each("watermark_scorer")
@pytest.mark.parametrize(("seed", "size"), [(3, (320, 180)), (6, (320, 180)), (8, (180, 320))])
def test_a_logo_over_a_moving_picture_is_found(
    backend: tuple[str, str], seed: int, size: tuple[int, int], frames_of: Callable
) -> None:
    video = logo_clip(seed, logo=True, size=size)
    found = build(*backend).score(frames_of(video))
    assert found.probability is not None and found.probability >= 0.7
    box = np.array(truth(video)["overlays"][0]["box_px"]) / (*size, *size)
    assert found.box is not None and np.abs(np.array(found.box) - box).max() < 0.06
    assert 0 < found.area_ratio < 0.1


@each("watermark_scorer")
@pytest.mark.parametrize("seed", [3, 4, 6, 8])
def test_a_moving_picture_without_a_logo_has_none(backend: tuple[str, str], seed: int, frames_of: Callable) -> None:
    found = build(*backend).score(frames_of(logo_clip(seed, logo=False)))
    assert found.probability is not None and found.probability <= 0.3


@each("watermark_scorer")
@pytest.mark.parametrize("logo", [True, False])
def test_nothing_can_be_told_of_a_clip_in_which_little_moves(backend: tuple[str, str], logo: bool, frames_of: Callable) -> None:
    found = build(*backend).score(frames_of(logo_clip(5, logo=logo, camera="static")))
    assert found.probability is None and found.box is None


@each("watermark_scorer")
def test_watermark_verdicts_are_finite_and_repeatable(backend: tuple[str, str], frames_of: Callable) -> None:
    scorer = build(*backend)
    noise = np.random.default_rng(0).integers(0, 256, (16, 90, 160, 3)).astype(np.uint8)
    for frames in (odd_frames(90, 160), noise, np.zeros((12, 90, 160, 3), np.uint8), noise[:1]):
        first, second = scorer.score(frames), scorer.score(frames)
        assert first == second
        assert first.probability is None or 0 <= first.probability <= 0.5


# --- aesthetics --------------------------------------------------------------------------------------------------------


@each("aesthetic_scorer")
@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_scores_are_on_the_scale_alone_and_in_a_batch(backend: tuple[str, str], size: str) -> None:
    scorer, frames = build(*backend), odd_frames(*SIZES[size])
    found = scorer.score(frames)
    assert found.score.shape == (len(frames),) and found.score.dtype == np.float32
    assert np.isfinite(found.score).all() and found.score.min() >= 1 and found.score.max() <= 10
    single = [scorer.score(f[None]) for f in frames]
    assert np.allclose(found.score, np.concatenate([s.score for s in single]))
    for name, values in found.parts.items():
        assert values.shape == found.score.shape and values.min() >= 0 and values.max() <= 1, name
        assert np.allclose(values, np.concatenate([s.parts[name] for s in single])), name
    assert np.array_equal(found.score, scorer.score(frames).score)


SPOILT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sharpness": lambda f: cv2.GaussianBlur(f, (0, 0), 5),
    "exposure": lambda f: cv2.convertScaleAbs(f, alpha=0.15),
    "colourfulness": lambda f: np.repeat(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2),
    "contrast": lambda f: cv2.convertScaleAbs(f, alpha=0.1, beta=110),
    "noise": lambda f: np.clip(f + np.random.default_rng(0).normal(0, 25, f.shape), 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("part", SPOILT)
@pytest.mark.parametrize("seed", [1, 2, 4])
def test_a_spoilt_frame_scores_lower_in_its_part_and_in_total(part: str, seed: int, frames_of: Callable) -> None:
    clean = frames_of(single_shot(seed, duration_s=0.05))[0]
    found = build("aesthetic_scorer", "photographic").score(np.stack([clean, SPOILT[part](clean)]))
    assert found.parts[part][1] < found.parts[part][0] - 0.3
    assert found.score[1] < found.score[0]


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_an_overexposed_frame_scores_lower_in_exposure_and_in_total(seed: int, frames_of: Callable) -> None:
    clean = frames_of(single_shot(seed, duration_s=0.05))[0]
    found = build("aesthetic_scorer", "photographic").score(np.stack([clean, cv2.convertScaleAbs(clean, alpha=2.3)]))
    assert found.parts["exposure"][1] < 0.3 < 0.8 < found.parts["exposure"][0]
    assert found.score[1] < found.score[0] - 1
