"""The camera model: exact on analytic flow, unmoved by a subject of a third of the picture; and one label per kind of move."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waver_core.camera import LABELS, CameraRules, CameraStep, drop_explained, fit_step, label_camera

HEIGHT, WIDTH = 144, 256
SIZE = (456, 256)
RULES = CameraRules()


def field(step: CameraStep, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The flow [H, W, 2] of a similarity about the picture's centre."""
    ys, xs = np.mgrid[:height, :width].astype(float)
    x, y = xs - width / 2, ys - height / 2
    c, s = step.scale * np.cos(step.turn_rad), step.scale * np.sin(step.turn_rad)
    return np.stack([c * x - s * y + step.shift_x_px - x, s * x + c * y + step.shift_y_px - y], axis=2).astype(np.float32)


@st.composite
def blocks(draw: st.DrawFn, share: float = 0.3) -> tuple[slice, slice]:
    """A rectangle of the picture of at most `share` of its area, anywhere in it."""
    height = draw(st.integers(round(share * HEIGHT), HEIGHT))
    width = min(WIDTH, int(share * HEIGHT * WIDTH / height))
    top, left = draw(st.integers(0, HEIGHT - height)), draw(st.integers(0, WIDTH - width))
    return slice(top, top + height), slice(left, left + width)


steps = st.builds(CameraStep, st.floats(-8, 8), st.floats(-8, 8), st.floats(0.97, 1.03), st.floats(-0.03, 0.03))
pushes = st.tuples(st.floats(3, 15), st.floats(0, 2 * np.pi)).map(lambda p: p[0] * np.array([np.cos(p[1]), np.sin(p[1])]))


def assert_close(found: CameraStep, wanted: CameraStep) -> None:
    assert found.shift_x_px == pytest.approx(wanted.shift_x_px, abs=0.05)
    assert found.shift_y_px == pytest.approx(wanted.shift_y_px, abs=0.05)
    assert found.scale == pytest.approx(wanted.scale, abs=1e-3)
    assert found.turn_rad == pytest.approx(wanted.turn_rad, abs=1e-3)


@given(steps)
def test_a_pure_camera_move_is_recovered_and_leaves_no_residual(step: CameraStep) -> None:
    found, residual = fit_step(field(step))[:2]
    assert_close(found, step)
    assert residual.shape == (HEIGHT // 2, WIDTH // 2) and residual.dtype == np.float32
    assert float(residual.max()) < 0.02


@given(steps, blocks(), pushes)
@settings(max_examples=100)
def test_a_subject_of_a_third_of_the_picture_does_not_pull_the_model(
    step: CameraStep, block: tuple[slice, slice], push: np.ndarray
) -> None:
    flow = field(step)
    flow[block] += push
    found, residual = fit_step(flow)[:2]
    assert_close(found, step)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[block] = True
    inside = inside[::2, ::2]
    assert float(residual[~inside].max()) < 0.1
    assert float(np.abs(residual[inside] - np.linalg.norm(push)).max()) < 0.1


def test_noise_in_the_flow_hardly_moves_the_model() -> None:
    step = CameraStep(3.0, -2.0, 1.01, 0.01)
    noise = np.random.default_rng(0).normal(0, 0.3, (HEIGHT, WIDTH, 2)).astype(np.float32)
    found = fit_step(field(step) + noise)[0]
    assert np.abs(np.array(found) - np.array(step)).max() < 0.1


def test_a_slight_shear_is_perspective_and_no_residual() -> None:
    flow = field(CameraStep(2.0, 0.0, 1.0, 0.0))
    flow[..., 0] += 0.01 * (np.arange(HEIGHT) - HEIGHT / 2)[:, None]
    residual = fit_step(flow)[1]
    assert float(np.median(residual)) < 0.05


def test_flow_where_nothing_is_to_be_seen_is_not_believed() -> None:
    """The right two fifths are blank, and their flow is wild: the textured part alone speaks."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    grey[:, WIDTH * 3 // 5 :] = 128
    flow = field(CameraStep(4.0, 1.0, 1.0, 0.0))
    flow[:, WIDTH * 3 // 5 :] = (-6.0, 5.0)
    assert_close(fit_step(flow, grey)[0], CameraStep(4.0, 1.0, 1.0, 0.0))


def test_flow_without_any_model_gives_finite_numbers() -> None:
    wild = np.random.default_rng(0).uniform(-40, 40, (HEIGHT, WIDTH, 2)).astype(np.float32)
    for flow in (wild, np.zeros_like(wild)):
        found, residual = fit_step(flow)[:2]
        assert np.isfinite(found).all() and np.isfinite(residual).all()
    assert_close(fit_step(np.zeros_like(wild))[0], CameraStep(0, 0, 1, 0))


def test_foreground_that_the_camera_explains_is_dropped_and_a_true_subject_stays() -> None:
    rng = np.random.default_rng(0)
    world = cv2.GaussianBlur(rng.integers(0, 256, (HEIGHT + 40, WIDTH + 40)).astype(np.uint8), (0, 0), 1.5)
    world = cv2.normalize(world, None, 0, 255, cv2.NORM_MINMAX)
    first, second = world[20:-20, 20:-20].copy(), world[20:-20, 26:-14].copy()  # the picture moves 6 px to the left
    first[20:60, 40:80], second[20:60, 70:110] = 255, 255  # a subject that goes right
    affine = np.array([[1.0, 0, -6.0], [0, 1.0, 0]], np.float32)
    mask = np.zeros((HEIGHT // 2, WIDTH // 2), bool)
    mask[10:30, 20:40] = True  # the subject
    mask[45:60, 80:110] = True  # an error of the flow
    mask[40:70, 0:3] = True  # what leaves the frame
    kept = drop_explained(mask, first, second, affine)
    assert kept[10:30, 20:40].all()
    assert kept.sum() == 20 * 20
    assert not drop_explained(np.zeros_like(mask), first, second, affine).any()


# --- labels ------------------------------------------------------------------------------------------------------------

STILL = CameraStep(0.0, 0.0, 1.0, 0.0)
KINDS = {
    "static": STILL,
    "pan_right": CameraStep(-3.0, 0.0, 1.0, 0.0),
    "pan_left": CameraStep(3.0, 0.0, 1.0, 0.0),
    "tilt_up": CameraStep(0.0, 3.0, 1.0, 0.0),
    "tilt_down": CameraStep(0.0, -3.0, 1.0, 0.0),
    "zoom_in": CameraStep(0.0, 0.0, 1.02, 0.0),
    "zoom_out": CameraStep(0.0, 0.0, 0.98, 0.0),
    "complex": CameraStep(3.0, 2.8, 1.0, 0.0),
}


def wobble(step: CameraStep, n: int, size_px: float, seed: int = 0) -> list[CameraStep]:
    """n steps about one, with a little hand in each."""
    rng = np.random.default_rng(seed)
    return [
        step._replace(shift_x_px=step.shift_x_px + dx, shift_y_px=step.shift_y_px + dy)
        for dx, dy in rng.normal(0, size_px, (n, 2))
    ]


@pytest.mark.parametrize("n", [1, 4, 16, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_move_has_its_label(kind: str, n: int) -> None:
    assert kind in LABELS
    assert label_camera([KINDS[kind]] * n, SIZE, RULES) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_labels_stand_a_steady_hand(kind: str) -> None:
    assert label_camera(wobble(KINDS[kind], 24, 0.1), SIZE, RULES) == kind


@pytest.mark.parametrize("kind", ["pan_right", "tilt_up", "zoom_in", "static"])
def test_a_few_misfits_change_no_label(kind: str) -> None:
    moves = [KINDS[kind]] * 30
    moves[7], moves[19] = CameraStep(40.0, -35.0, 1.2, 0.1), CameraStep(-50.0, 10.0, 0.9, 0.0)
    assert label_camera(moves, SIZE, RULES) == kind


@pytest.mark.parametrize("seed", range(3))
def test_back_and_forth_is_shake(seed: int) -> None:
    assert label_camera(wobble(STILL, 24, 3.0, seed), SIZE, RULES) == "shake"


def test_a_strong_pan_with_some_jitter_stays_a_pan() -> None:
    assert label_camera(wobble(KINDS["pan_left"]._replace(shift_x_px=12.0), 24, 1.0), SIZE, RULES) == "pan_left"


def test_there_and_back_again_is_complex_and_not_static() -> None:
    moves = [KINDS["pan_left"]] * 20 + [KINDS["pan_right"]] * 20
    assert label_camera(moves, SIZE, RULES) == "complex"


def test_no_steps_and_small_drifts_are_static() -> None:
    assert label_camera([], SIZE, RULES) == "static"
    assert label_camera([CameraStep(0.2, 0.1, 1.0, 0.0)] * 20, SIZE, RULES) == "static"


def test_thresholds_come_from_the_rules() -> None:
    slow = [CameraStep(-0.6, 0.0, 1.0, 0.0)] * 20
    assert label_camera(slow, SIZE, RULES) == "pan_right"
    assert label_camera(slow, SIZE, CameraRules(min_move_px=1.0)) == "static"
    both = [CameraStep(-3.0, 2.0, 1.0, 0.0)] * 20
    assert label_camera(both, SIZE, RULES) == "complex"
    assert label_camera(both, SIZE, CameraRules(dominance=1.3)) == "pan_right"


@given(st.sampled_from([k for k in KINDS if k != "complex"]), blocks(), pushes)
@settings(max_examples=25)
def test_a_moving_subject_does_not_change_the_label(kind: str, block: tuple[slice, slice], push: np.ndarray) -> None:
    flow = field(KINDS[kind])
    plain = label_camera([fit_step(flow)[0]] * 8, (WIDTH, HEIGHT), RULES)
    flow[block] += push
    assert plain == kind
    assert label_camera([fit_step(flow)[0]] * 8, (WIDTH, HEIGHT), RULES) == plain
