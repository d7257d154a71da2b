"""Where the camera and the shapes are, frame by frame: one source for both the renderer and the truth.

Frames of a shot are counted from its first clean frame; a transition before it has negative ones. Pixel coordinates
are those of the picture within the borders, with pixel centres on whole numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from waver_core.synthetic.scenes import DIRECTIONS, Shape, Shot, Video
from waver_core.synthetic.timeline import clean_frames, shot_margins

STUTTER_BLOCK_FRAMES = 12
JUMP_SHIFT_SHORT_SIDES = (0.22, -0.10)
JUMP_ZOOM = 1.35
JUMP_SQUEEZE = 0.72  # foreshortening of x: the affine part of a viewpoint some 44 degrees to the side
JUMP_ROLL_RAD = 0.09


class Clock(NamedTuple):
    """Source time per frame: of the scene, of the camera [s], and whether the viewpoint has jumped. Each ``[N]``."""

    scene_s: np.ndarray
    camera_s: np.ndarray
    jumped: np.ndarray


def shot_rng(video: Video, shot: Shot, *salt: int) -> np.random.Generator:
    """An independent random stream for one purpose within a shot (each purpose has its own salt)."""
    return np.random.default_rng([video.seed, shot.seed, *salt])


def time_factor(shot: Shot) -> float:
    """How many source frames pass per frame of the video: below 1 in slow motion, 0 for a still."""
    if shot.defect("still") is not None:
        return 0.0
    slow = shot.defect("slow_motion") or shot.defect("slow_motion_blend") or 1.0
    return (shot.defect("fast_motion") or 1.0) / slow


def clock(video: Video, index: int, frames: np.ndarray) -> Clock:
    """Source times of frames ``[N]`` of a shot; fractional source frames occur for "slow_motion_blend" only."""
    shot = video.shots[index]
    frames = np.asarray(frames)
    slow = shot.defect("slow_motion")
    source = frames * time_factor(shot) if slow is None else np.floor_divide(frames, int(slow))
    if (frozen := shot.defect("stutter")) is not None:
        n_frozen = min(int(frozen), STUTTER_BLOCK_FRAMES - 1)
        block, step = np.divmod(frames, STUTTER_BLOCK_FRAMES)
        starts = shot_rng(video, shot, 4).integers(0, STUTTER_BLOCK_FRAMES - n_frozen, size=1024)
        start = starts[block % len(starts)]
        held = (step > start) & (step <= start + n_frozen) & (frames >= 0)
        source = np.where(held, source - (step - start), source)
    jump = shot.defect("perspective_change")
    jump_frame = np.inf if jump is None else round(clean_frames(video, shot) * jump)
    seconds = source / float(video.fps)
    scene_s = np.zeros_like(seconds) if shot.defect("image_animation") is not None else seconds
    return Clock(scene_s, seconds, frames >= jump_frame)


def _shake(video: Video, shot: Shot, rms: float, time_s: np.ndarray) -> np.ndarray:
    """Hand shake [N, 3]: x and y in short sides, roll in radians; a sum of waves of 1.2 to 4.5 Hz with zero mean."""
    rng = shot_rng(video, shot, 2)
    frequency_hz = rng.uniform(1.2, 4.5, size=(3, 5))
    phase = rng.uniform(0, 2 * np.pi, size=(3, 5))

    def waves(t: np.ndarray) -> np.ndarray:
        angle = 2 * np.pi * frequency_hz * np.atleast_1d(t)[:, None, None] + phase
        return np.sin(angle).sum(axis=2) * np.sqrt(2 / 5)

    n = clean_frames(video, shot)
    mean = waves(np.arange(n) * time_factor(shot) / float(video.fps)).mean(axis=0)
    return (waves(time_s) - mean) * np.array([rms, rms, rms * 0.5])


def view_matrices(video: Video, index: int, at: Clock) -> np.ndarray:
    """World (short sides) to picture (px), affine ``[N, 2, 3]`` float64."""
    shot, camera = video.shots[index], video.shots[index].camera
    width, height = video.content_size_px
    time_s = np.asarray(at.camera_s, dtype=np.float64)
    duration_s = (clean_frames(video, shot) - 1) * time_factor(shot) / float(video.fps)
    toward = {"pan_left": "left", "pan_right": "right", "tilt_up": "up", "tilt_down": "down"}.get(camera.kind, "rest")
    centre = np.array(DIRECTIONS[toward]) * camera.rate_short_sides_per_s * time_s[:, None]
    zoom = np.ones_like(time_s)
    if camera.kind == "zoom_in":
        zoom = camera.zoom_factor_per_s**time_s
    elif camera.kind == "zoom_out":
        zoom = camera.zoom_factor_per_s ** (duration_s - time_s)
    roll = np.zeros_like(time_s)
    rms = camera.shake_rms_short_sides if camera.kind == "shake" else shot.defect("unstable_motion")
    if rms is not None:
        shake = _shake(video, shot, rms, time_s)
        centre, roll = centre + shake[:, :2], roll + shake[:, 2]
    centre = centre + np.where(at.jumped[:, None], JUMP_SHIFT_SHORT_SIDES, (0.0, 0.0))
    zoom = zoom * np.where(at.jumped, JUMP_ZOOM, 1.0)
    roll = roll + np.where(at.jumped, JUMP_ROLL_RAD, 0.0)
    squeeze = np.where(at.jumped, JUMP_SQUEEZE, 1.0)

    cos, sin, scale = np.cos(roll), np.sin(roll), video.short_side_px * zoom
    linear = np.stack([cos * squeeze, sin, -sin * squeeze, cos], axis=1).reshape(-1, 2, 2) * scale[:, None, None]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = middle - np.einsum("nij,nj->ni", linear, centre)
    return np.concatenate([linear, offset[:, :, None]], axis=2)


def _edge(position: np.ndarray, half_box: np.ndarray, how: str) -> np.ndarray:
    """Fold positions ``[N, 2]`` into a box around the origin: mirrored for "bounce", repeated for "wrap"."""
    if how == "leave":
        return position
    if how == "wrap":
        return (position + half_box) % (2 * half_box) - half_box
    return np.abs((position - half_box) % (4 * half_box) - 2 * half_box) - half_box


def shape_world(video: Video, shape: Shape, time_s: np.ndarray) -> np.ndarray:
    """Centres of a shape in the world ``[N, 2]`` (short sides) at scene times ``[N]``."""
    velocity = np.array(DIRECTIONS[shape.direction]) * shape.speed_short_sides_per_s
    position = np.array(shape.start_short_sides) + velocity * np.asarray(time_s)[:, None]
    half_view = np.array(video.content_size_px) / (2 * video.short_side_px)
    margin = shape.size_short_sides / 2 * (-1 if shape.at_edge == "wrap" else 1)
    return _edge(position, np.maximum(half_view - margin, 0.05), shape.at_edge)


def cutoff_shift(video: Video, index: int) -> np.ndarray:
    """Shift ``[2]`` (short sides) of the first shape that puts it across the right edge at mid-shot."""
    shot = video.shots[index]
    part = shot.defect("subject_cutoff")
    if part is None:
        return np.zeros(2)
    shape, middle = shot.shapes[0], np.array([clean_frames(video, shot) // 2])
    at = clock(video, index, middle)
    matrix = view_matrices(video, index, at)[0]
    x_px, _ = matrix @ np.append(shape_world(video, shape, at.scene_s)[0], 1.0)
    diameter_px = shape.size_short_sides * np.linalg.norm(matrix[:, 0])
    wanted_px = video.content_size_px[0] - 0.5 + (part - 0.5) * diameter_px
    return np.linalg.solve(matrix[:, :2], np.array([wanted_px - x_px, 0.0]))


def shape_world_at(video: Video, index: int, shape_index: int, at: Clock) -> np.ndarray:
    """Like ``shape_world`` for a shape of a shot, with the shift of a "subject_cutoff" defect."""
    world = shape_world(video, video.shots[index].shapes[shape_index], at.scene_s)
    return world + cutoff_shift(video, index) if shape_index == 0 else world


def shape_path_px(video: Video, index: int, shape_index: int) -> np.ndarray:
    """Centres of a shape on screen in the clean frames of a shot: ``[T, 2]`` x, y in px of the whole picture."""
    at = clock(video, index, np.arange(clean_frames(video, video.shots[index])))
    matrices = view_matrices(video, index, at)
    world = shape_world_at(video, index, shape_index, at)
    return _project(matrices, world) + (video.border.left_px, video.border.top_px)


def background_path_px(video: Video, index: int) -> np.ndarray:
    """Path ``[T, 2]`` in px of the point of the world that the shot's first clean frame has in its middle."""
    at = clock(video, index, np.arange(clean_frames(video, video.shots[index])))
    matrices = view_matrices(video, index, at)
    width, height = video.content_size_px
    middle = np.array([(width - 1) / 2, (height - 1) / 2]) - matrices[0, :, 2]
    world = np.linalg.solve(matrices[0, :, :2], middle)
    return _project(matrices, np.broadcast_to(world, (len(matrices), 2))) + (video.border.left_px, video.border.top_px)


def _project(matrices: np.ndarray, world: np.ndarray) -> np.ndarray:
    return np.einsum("nij,nj->ni", matrices[:, :, :2], world) + matrices[:, :, 2]


def world_bounds(video: Video, index: int) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of the world that a shot ever sees, its transitions included; snapped outward to 1/4."""
    lead, tail = shot_margins(video, index)
    frames = np.arange(-lead, clean_frames(video, video.shots[index]) + tail + 1)
    matrices = view_matrices(video, index, clock(video, index, frames))
    width, height = video.content_size_px
    corners = np.array([(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)], dtype=np.float64)
    inverse = np.linalg.inv(matrices[:, :, :2])
    world = np.einsum("nij,nkj->nki", inverse, corners - matrices[:, None, :, 2])
    low = np.floor((world.min(axis=(0, 1)) - 0.02) * 4) / 4
    high = np.ceil((world.max(axis=(0, 1)) + 0.02) * 4) / 4
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])
