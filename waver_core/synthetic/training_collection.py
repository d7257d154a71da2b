"""Small clips for a tiny video model to learn from: one shape of a clear colour that moves one way over a plain ground.

They are made for few frames of few pixels (9 frames of 64x64 at 4 a second, say): large shapes, six colours that stay apart
through a coarse codec, four directions, and within two seconds a way of a third of the picture or more. Colours and
directions are dealt evenly; place, size, speed, ground and tempo are drawn. What they show is not handed on: the funnel
measures and captions these files like any others.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from waver_core.synthetic.casting import palettes_for
from waver_core.synthetic.scenes import DIRECTIONS, Background, File, Shape, Shot, Video

TRAINING_COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
"""Of the palette's ten those whose hues lie furthest apart."""
TRAINING_DIRECTIONS = ("left", "right", "up", "down")
_KINDS = ("disc", "disc", "disc", "square")
_SIDE_PX = 160
_FPS = (12, 16)
_IMAGE_EVERY = 7
"""One file in so many is a still picture: they are trained together with the videos (Waver §4.1)."""
_MARGIN = 0.05
"""Short sides between a shape and the rim: one that touches it, be it in a coarse codec's blocks, counts as cut off."""


def training_collection(n: int = 480, seed: int = 0) -> list[Video]:
    """`n` files of one shot each, about one in seven a picture (PNG); the first files of a longer collection are the same.

    Raises ValueError for n under 1.
    """
    if n < 1:
        raise ValueError(f"a collection has at least 1 file, not {n}")
    out = []
    videos = images = 0
    for number in range(n):
        still = number % _IMAGE_EVERY == _IMAGE_EVERY - 1
        turn = images if still else videos
        images, videos = images + still, videos + (not still)
        out.append(_scene(turn, still, np.random.default_rng([seed, 41, number]), f"{number:04}"))
    return out


def _scene(turn: int, still: bool, rng: np.random.Generator, prefix: str) -> Video:
    colour = TRAINING_COLOURS[turn % len(TRAINING_COLOURS)]
    direction = "rest" if still else TRAINING_DIRECTIONS[turn // len(TRAINING_COLOURS) % len(TRAINING_DIRECTIONS)]
    kind = str(rng.choice(_KINDS))
    size = float(rng.uniform(0.27, 0.40))
    fps = Fraction(int(rng.choice(_FPS)))
    duration_s = float(1 / fps) if still else float(rng.uniform(2.3, 2.6))
    reach = 0.5 - size / 2 - _MARGIN  # of the centre from the middle
    speed = 0.0 if still else float(rng.uniform(0.17, min(0.26, 1.96 * reach / duration_s)))
    drift = np.array(DIRECTIONS[direction]) * speed * duration_s
    start = rng.uniform(-1, 1, size=2) * (reach - np.abs(drift) / 2) - drift / 2
    actor = Shape(colour, kind, direction, size, speed, (float(start[0]), float(start[1])))
    world = int(rng.integers(2**31))
    shot = Shot(duration_s, Background("plain", str(rng.choice(palettes_for(colour)))), (actor,), seed=world)
    name = f"{prefix}_{colour}_{kind}_{direction}"
    file = File(".png") if still else File(crf=14)
    return Video(name, (shot,), width_px=_SIDE_PX, height_px=_SIDE_PX, fps=fps, seed=world, file=file)
