"""Makes shots and whole videos from a seed: looks that go together, and motion that stays in sight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from waver_core.synthetic.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PALETTES,
    SHAPE_KINDS,
    Background,
    Camera,
    Shape,
    Shot,
    Transition,
    Video,
)

CALM_CAMERAS = ("static", "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out")
TEXTURED = tuple(kind for kind in BACKGROUNDS if kind != "plain")
MOVING = tuple(direction for direction in DIRECTIONS if direction != "rest")
_CLEAR_DISTANCE = 75.0  # sRGB levels between a colour and every tone of a palette: keeps green off meadows


def palettes_for(colour: str) -> list[str]:
    """Names of the palettes on which a colour stands out; all of them for a colour that does so on none."""
    srgb = np.array(COLOURS[colour])
    clear = [name for name, ramp in PALETTES.items() if np.linalg.norm(np.array(ramp) - srgb, axis=1).min() > _CLEAR_DISTANCE]
    return clear or list(PALETTES)


def _camera_velocity(camera: Camera) -> np.ndarray:
    toward = {"pan_left": "left", "pan_right": "right", "tilt_up": "up", "tilt_down": "down"}.get(camera.kind, "rest")
    return np.array(DIRECTIONS[toward]) * camera.rate_short_sides_per_s


def centred(shape: Shape, camera: Camera, duration_s: float, at: tuple[float, float] = (0.0, 0.0)) -> Shape:
    """Move the start of a shape so that at mid-shot it is ``at`` (short sides) from the middle of the picture."""
    velocity = np.array(DIRECTIONS[shape.direction]) * shape.speed_short_sides_per_s
    start = np.array(at) + (_camera_velocity(camera) - velocity) * (duration_s / 2)
    return replace(shape, start_short_sides=(float(start[0]), float(start[1])))


def single_shot(
    seed: int,
    *,
    camera: str | Camera = "static",
    colour: str = "red",
    shape: str = "disc",
    direction: str = "right",
    duration_s: float = 2.0,
    width_px: int = 640,
    height_px: int = 360,
    fps: Fraction | int = 24,
    size_short_sides: float = 0.28,
    speed_short_sides_per_s: float = 0.25,
    background: Background | None = None,
    name: str = "",
) -> Video:
    """A video of one shot with one shape, in the middle of the picture at mid-shot; the seed draws the background.

    The speed is kept as stated, so a fast shape leaves the picture in a long shot. ``direction`` is in the world: under
    a moving camera the screen shows another one (see ``truth``). A shape at "rest" ignores the speed.
    """
    rng = np.random.default_rng([seed, 11])
    if background is None:
        background = Background(str(rng.choice(TEXTURED)), str(rng.choice(palettes_for(colour))))
    move = Camera(camera) if isinstance(camera, str) else camera
    speed = 0.0 if direction == "rest" else speed_short_sides_per_s
    actor = centred(Shape(colour, shape, direction, size_short_sides, speed), move, duration_s)
    shot = Shot(duration_s, background, (actor,), move, seed=seed)
    label = name or f"{colour}_{shape}_{direction}_{move.kind}_{seed}"
    return Video(label, (shot,), width_px=width_px, height_px=height_px, fps=Fraction(fps), seed=seed)


def random_shot(
    rng: np.random.Generator,
    *,
    camera: str,
    background: Background,
    duration_s: float,
    size_px: tuple[int, int],
    n_shapes: int = 1,
) -> Shot:
    """A good shot: shapes that stand out and move clearly, slowed as far as needed to stay in sight throughout."""
    usable = [colour for colour in COLOURS if background.palette in palettes_for(colour)]
    colours = rng.permutation(usable)[:n_shapes]
    room = np.array(size_px) / min(size_px)
    zoom = min(1.10, 1.35 ** (1 / duration_s))
    move = Camera(camera, float(rng.uniform(0.06, 0.12)), float(rng.uniform(min(1.05, zoom), zoom)))
    if camera.startswith("zoom"):
        room = room / move.zoom_factor_per_s**duration_s
    shapes: list[Shape] = []
    scale = 1.0  # common slow-down of camera and shapes
    for colour in colours:
        size = float(rng.uniform(0.24, 0.34) / (1 if n_shapes == 1 else 1.25))
        direction = str(rng.choice(MOVING))
        speed = float(rng.uniform(0.2, 0.36))
        drift = np.abs((np.array(DIRECTIONS[direction]) * speed - _camera_velocity(move)) * duration_s)
        free = np.maximum(room - size - 0.04, 0.05)
        scale = min(scale, *(free / np.maximum(drift, 1e-6)))
        shapes.append(Shape(str(colour), str(rng.choice(SHAPE_KINDS)), direction, size, speed))
    move = replace(move, rate_short_sides_per_s=move.rate_short_sides_per_s * scale)
    placed = []
    for number, actor in enumerate(shapes):
        actor = replace(actor, speed_short_sides_per_s=actor.speed_short_sides_per_s * scale)
        velocity = np.array(DIRECTIONS[actor.direction]) * actor.speed_short_sides_per_s
        spare = np.maximum((room - actor.size_short_sides - 0.04 - np.abs(velocity - _camera_velocity(move)) * duration_s) / 2, 0)
        # Several shapes share the width, a column each, so that they seldom cover one another.
        column = 0.0 if len(shapes) == 1 else 2 * number / (len(shapes) - 1) - 1
        at = spare * (rng.uniform(-0.5, 0.5, size=2) if len(shapes) == 1 else (column, rng.uniform(-1, 1)))
        placed.append(centred(actor, move, duration_s, (float(at[0]), float(at[1]))))
    return Shot(duration_s, background, tuple(placed), move, seed=int(rng.integers(2**31)))


def random_background(rng: np.random.Generator, before: Background | None) -> Background:
    """A textured background that differs from the one before in structure and clearly in colour."""
    kinds, palettes = list(TEXTURED), list(PALETTES)
    if before is not None:
        last = np.array(PALETTES[before.palette], dtype=float).mean(axis=0)
        kinds = [kind for kind in TEXTURED if kind != before.kind]
        palettes = [name for name in PALETTES if np.linalg.norm(np.array(PALETTES[name]).mean(axis=0) - last) > 28]
    return Background(str(rng.choice(kinds)), str(rng.choice(palettes)))


def random_transition(rng: np.random.Generator, kind: str, fps: Fraction) -> Transition:
    """A transition of 0.4 to 1 s (a fade 0.6 to 1.2 s), with an odd number of frames so that a fade reaches black."""
    if kind == "cut":
        return Transition()
    low, high = (0.4, 1.0) if kind == "dissolve" else (0.6, 1.2)
    return Transition(kind, max(1, int(rng.uniform(low, high) * fps) // 2 * 2 + 1))


def random_video(
    seed: int,
    *,
    n_shots: int = 5,
    width_px: int = 640,
    height_px: int = 360,
    fps: Fraction | int = 24,
    transitions: Sequence[str] = ("cut", "dissolve", "fade"),
    cameras: Sequence[str] = CALM_CAMERAS,
    durations_s: tuple[float, float] = (2.0, 6.0),
    name: str = "",
) -> Video:
    """A clean multi-shot video; neighbouring shots differ clearly in background.

    Shots last between the two durations, cameras and transitions are drawn evenly from those given. About one shot in
    three has two shapes.
    """
    rng = np.random.default_rng([seed, 7])
    rate = Fraction(fps)
    shots: list[Shot] = []
    deck: list[str] = []
    for _ in range(n_shots):
        deck = deck or [str(camera) for camera in rng.permutation(list(cameras))]
        background = random_background(rng, shots[-1].background if shots else None)
        shots.append(
            random_shot(
                rng,
                camera=deck.pop(),
                background=background,
                duration_s=float(rng.uniform(*durations_s)),
                size_px=(width_px, height_px),
                n_shapes=2 if rng.random() < 0.33 else 1,
            )
        )
    kinds = [list(transitions)[(i + seed) % len(transitions)] for i in range(n_shots - 1)]
    between = tuple(random_transition(rng, str(kind), rate) for kind in rng.permutation(kinds))
    label = name or f"random_{seed}"
    return Video(label, tuple(shots), between, width_px, height_px, rate, seed=seed)
