"""A clip made ready for measurement: frames at one working size, and the camera followed through them."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from waver_core.backends.contracts import FlowEstimator
from waver_core.camera import CameraRules, CameraStep, FittedStep, fit_step, label_camera
from waver_core.captions.facts import CAMERAS
from waver_core.captions.tracking import Track

WORKING_PX = 192
"""Short side at which pictures are measured; others are resized, so that all pixel thresholds hold."""
_STEPS_PER_S = 6.0
_CAMERA_GAIN = 0.88
"""Part of the difference between frames that must be left, at most, once the camera's move is taken away."""
_CAMERA_LEVELS = 0.15
"""And by how many levels it must be less besides, for differences of a fraction of a level are rounding."""


class Scene(NamedTuple):
    """Frames at working size, times from the clip's start, flow between neighbours [T-1, H, W, 2], the camera's steps, and how
    each frame's pixels map onto the middle frame's [T, 3, 3]. `moves`: whether the camera does."""

    rgb: np.ndarray
    times_s: np.ndarray
    flow: np.ndarray
    fitted: list[FittedStep]
    to_middle: np.ndarray
    moves: bool = True


def look(rgb: np.ndarray, times_s: np.ndarray, flow: FlowEstimator) -> Scene:
    """Bring frames to working size, drop repeated ones, and follow the camera through them."""
    distinct = np.flatnonzero(np.diff(times_s, prepend=-1e9) > 1e-6)
    rgb, times_s = rgb[distinct], times_s[distinct]
    scale = WORKING_PX / min(rgb.shape[1:3])
    if not 0.8 < scale < 1.2:
        size = round(rgb.shape[2] * scale), round(rgb.shape[1] * scale)
        how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
        rgb = np.stack([cv2.resize(f, size, interpolation=how) for f in rgb])
    n, (height, width) = len(rgb), rgb.shape[1:3]
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in rgb]
    fields = flow.flow(rgb)
    fitted = [fit_step(f, grey[t]) for t, f in enumerate(fields)]
    to_middle = _onto_middle([f.camera for f in fitted], n, width, height)
    return Scene(rgb, times_s, fields, fitted, to_middle)


def _onto_middle(steps: list[CameraStep], n: int, width: int, height: int) -> np.ndarray:
    """Chain camera steps (similarities about the centre) into matrices [T, 3, 3] from each frame's px to the middle frame's."""
    forward = [np.eye(3)]
    shift = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1.0]])
    for step in steps:
        c, s = step.scale * np.cos(step.turn_rad), step.scale * np.sin(step.turn_rad)
        about = np.array([[c, -s, step.shift_x_px], [s, c, step.shift_y_px], [0, 0, 1.0]])
        forward.append(shift @ about @ np.linalg.inv(shift) @ forward[-1])
    middle = forward[n // 2]
    return np.stack([middle @ np.linalg.inv(f) for f in forward])


def held_still(scene: Scene) -> Scene:
    """The same with a camera that does not move."""
    return scene._replace(to_middle=np.broadcast_to(np.eye(3), scene.to_middle.shape), moves=False)


def onto(matrix: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    """A point moved by a matrix [3, 3]."""
    moved: np.ndarray = matrix[:2, :2] @ np.array(point) + matrix[:2, 2]
    return moved


class Evidence(NamedTuple):
    """How well the camera's model explains a clip: mean difference of frames a second apart, outside the things, in levels
    (`still`), what is left of it with the camera's move taken away (`left`), and the share of the flow that agrees."""

    still: float
    left: float
    agreement: float

    @property
    def moves(self) -> bool:
        """Whether a moving camera explains the picture better than a still one."""
        return self.left < _CAMERA_GAIN * self.still - _CAMERA_LEVELS


def camera_evidence(scene: Scene, things: list[Track]) -> Evidence:
    """Compare frames a second apart, outside the things: over a plain background nothing but a thing has texture, and the
    model would follow the thing."""
    n, height, width = scene.rgb.shape[:3]
    per_s = (n - 1) / max(float(scene.times_s[-1] - scene.times_s[0]), 1e-3)
    gap = min(n - 1, max(1, round(per_s)))
    still: list[float] = []
    left: list[float] = []
    for a in range(0, n - gap, max(1, gap // 2)):
        b = a + gap
        # Noise is no evidence, neither for nor against.
        first, second = (cv2.GaussianBlur(cv2.cvtColor(scene.rgb[t], cv2.COLOR_RGB2GRAY), (0, 0), 2.0) for t in (a, b))
        between = np.linalg.inv(scene.to_middle[a]) @ scene.to_middle[b]
        warped = cv2.warpAffine(second, between[:2], (width, height), flags=cv2.INTER_LINEAR)
        seen = cv2.warpAffine(np.full_like(first, 255), between[:2], (width, height), flags=cv2.INTER_LINEAR) == 255
        use = seen & ~_near_things(things, (a, b), between, (height, width))
        if use.mean() > 0.1:
            still.append(float(np.minimum(cv2.absdiff(first, second), 40)[use].mean()))
            left.append(float(np.minimum(cv2.absdiff(first, warped), 40)[use].mean()))
    agreement = float(np.median([_agreement(f, m.camera) for f, m in zip(scene.flow, scene.fitted, strict=True)]))
    return Evidence(float(np.mean(still)), float(np.mean(left)), agreement) if still else Evidence(1.0, 0.0, agreement)


def _near_things(things: list[Track], frames: tuple[int, int], between: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: in or near a thing in either frame, before or after the camera's move."""
    covered = np.zeros(size, np.uint8)
    margin = WORKING_PX // 16  # a shadow goes with its thing
    for region in (r for track in things for r in track.regions if r.frame in frames):
        x0, y0, x1, y1 = region.box
        for low, high in (((x0, y0), (x1, y1)), (onto(between, (x0, y0)), onto(between, (x1, y1)))):
            corners = [(round(float(v[0]) + k), round(float(v[1]) + k)) for v, k in ((low, -margin), (high, margin))]
            cv2.rectangle(covered, corners[0], corners[1], 1, -1)
    return covered > 0


def _agreement(flow: np.ndarray, camera: CameraStep) -> float:
    """Share of a flow field [H, W, 2] that the camera's step explains."""
    height, width = flow.shape[:2]
    ys, xs = (v.ravel() for v in np.mgrid[4:height:8, 4:width:8])
    points = np.stack([xs - width / 2, ys - height / 2], axis=1)
    c, s = camera.scale * np.cos(camera.turn_rad), camera.scale * np.sin(camera.turn_rad)
    shift = points @ np.array([[c, -s], [s, c]]).T + [camera.shift_x_px, camera.shift_y_px] - points
    error = np.linalg.norm(flow[ys, xs] - shift, axis=1)
    return float((error < max(0.75, 0.15 * float(np.linalg.norm(shift, axis=1).mean()))).mean())


def camera_fact(scene: Scene, evidence: Evidence, known: str | None) -> str | None:
    """The camera's move where it is sure and plain to see, else None; known: the motion stage's label, which must agree."""
    own = camera_label(scene)
    label = known or ("static" if not evidence.moves else own)
    height, width = scene.rgb.shape[1:3]
    steps = np.array([[*f.camera[:2], np.log(max(f.camera.scale, 1e-3))] for f in scene.fitted])
    steps *= [1 / min(height, width), 1 / min(height, width), 1]
    net, total = np.abs(steps.sum(axis=0)), np.abs(steps).sum(axis=0) + 1e-6
    if label == "static":
        little = net[:2].max() < 0.04 and net[2] < 0.02
        unmoved = own == "static" and evidence.agreement > 0.4 and (little or not evidence.moves)
        return label if unmoved or (not evidence.moves and evidence.still < 4) else None
    if label != own or label not in CAMERAS or evidence.agreement < 0.4:
        return None
    unexplained = evidence.left / max(evidence.still, 1e-6)
    if unexplained > (0.75 if evidence.agreement > 0.9 else 0.68):
        return None
    axis = {"pan": 0, "tilt": 1, "zoom": 2}.get(label.split("_")[0])
    steady = axis is None or (net[axis] > 0.75 * total[axis] and net[axis] > (0.03 if axis == 2 else 0.06))
    return label if steady else None


def camera_label(scene: Scene) -> str:
    """The camera's move in one word, at the motion stage's scale."""
    height, width = scene.rgb.shape[1:3]
    unit = (1 / (np.diff(scene.times_s) * _STEPS_PER_S)) * (WORKING_PX / min(height, width))
    steps = [
        CameraStep(s.shift_x_px * u, s.shift_y_px * u, s.scale**u, s.turn_rad * u)
        for s, u in zip((f.camera for f in scene.fitted), unit.tolist(), strict=True)
    ]
    return label_camera(steps, (width, height), CameraRules())
