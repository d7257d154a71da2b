"""The facts that a caption may state (Waver §3.3: subjects, actions with their spans, background, camera, positions).

Everything optional is None (or empty) where it was not measured with confidence: it is left out, never guessed. Sides are
the viewer's. Lengths are in short sides of the picture, times in seconds from the clip's start.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

COLOURS = (
    *("red", "green", "blue", "yellow", "orange", "purple", "cyan", "magenta", "white", "black"),
    *("grey", "brown", "beige", "pink", "teal"),
)
"""The renderer's ten, and those that muted backgrounds need as well."""
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
SIZES = ("small", "medium-sized", "large")
SPEEDS = ("slowly", "steadily", "quickly")
LIGHTS = ("bright", "dim", "dark")
CAMERAS = ("static", "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "shake")
DIRECTIONS = ("left", "right", "up", "down", "up_left", "up_right", "down_left", "down_right")
MOTIONS = (*DIRECTIONS, "rest", "back_and_forth", "unsteady")
"""Of a phase; "back_and_forth" comes from prompts, a measured path has a phase for each way; "unsteady" goes no one way."""
POSITIONS = (
    *("upper left", "top", "upper right"),
    *("left", "centre", "right"),
    *("lower left", "bottom", "lower right"),
)
OPPOSITE = {"left": "right", "up": "down", "up_left": "down_right", "up_right": "down_left"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}


@dataclass(frozen=True)
class Phase:
    """One stretch of a motion. `speed` is in short sides a second against the scene, in steps of 0.01; a span of None
    means the whole clip."""

    motion: str
    speed_word: str | None = None
    speed: float | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class ObjectFacts:
    """One thing in the foreground; `position` is where it is first seen. No phases: its motion is not known."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    position: str | None = None
    phases: tuple[Phase, ...] = ()

    @property
    def motion(self) -> str | None:
        """The motion in one word: that of all phases, "back_and_forth" where opposite ways follow, None where mixed."""
        moving = [p.motion for p in self.phases if p.motion != "rest"]
        if not moving:
            return "rest" if self.phases else None
        if len(set(moving)) == 1:
            return moving[0]
        turns = pairwise(moving)
        return "back_and_forth" if all(OPPOSITE.get(a) == b for a, b in turns) else None


@dataclass(frozen=True)
class SceneFacts:
    """What one clip shows; `background` has its main colours, largest first, `texts` what stands written in it."""

    background: tuple[str, ...] = ()
    light: str | None = None
    camera: str | None = None
    objects: tuple[ObjectFacts, ...] = ()
    texts: tuple[str, ...] = ()


def speed_word(speed: float) -> str:
    """How a person would call a speed in short sides a second."""
    return "slowly" if speed < 0.12 else "steadily" if speed < 0.45 else "quickly"


def size_word(diameter: float) -> str:
    """How a person would call a thing of a diameter in short sides."""
    return "small" if diameter < 0.18 else "medium-sized" if diameter < 0.38 else "large"


def position_word(x: float, y: float) -> str:
    """The ninth of the picture that a point lies in; x and y as fractions of width and height."""
    column, row = min(2, max(0, int(x * 3))), min(2, max(0, int(y * 3)))
    return POSITIONS[3 * row + column]
