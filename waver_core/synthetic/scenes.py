"""What a synthetic video is made of: frozen, validated descriptions without a pixel in them.

Units. Lengths in the world are *short sides*: 1.0 is the shorter side of the picture (without its black borders) at
zoom 1, so one description renders alike at every size. The world's origin is the middle of the view at the start of a
shot, x points right and y down. Shapes live in the world and the camera moves over it: a shape at rest under a camera
that pans right drifts to the left on screen. ``truth`` reports both speeds.

Time. ``Shot.duration_s`` is the *clean* part of a shot. A gradual transition adds its own frames between two clean
parts, and both shots go on moving through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import sqrt

from waver_core.captions.colours import PALETTE

COLOURS = PALETTE
"""sRGB: shapes are painted in the middle of what goes by each name."""
SHAPE_KINDS = ("disc", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
_D = 1 / sqrt(2)
DIRECTIONS: dict[str, tuple[float, float]] = {  # unit vectors, x right, y down
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up_left": (-_D, -_D),
    "up_right": (_D, -_D),
    "down_left": (-_D, _D),
    "down_right": (_D, _D),
    "rest": (0.0, 0.0),
}
CAMERAS = ("static", "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "shake")
BACKGROUNDS = ("terrain", "hills", "checks", "stripes", "brick", "bokeh", "plain")
PALETTES: dict[str, tuple[tuple[int, int, int], ...]] = {  # dark to light, muted so that the shapes stand out
    "meadow": ((47, 72, 58), (84, 116, 80), (133, 157, 105), (184, 196, 142), (229, 230, 196)),
    "dusk": ((52, 44, 82), (98, 78, 122), (156, 112, 142), (211, 156, 156), (247, 214, 190)),
    "desert": ((96, 66, 54), (146, 104, 78), (190, 148, 108), (220, 188, 146), (243, 224, 190)),
    "ocean": ((32, 58, 86), (56, 94, 122), (98, 140, 160), (152, 188, 196), (212, 230, 230)),
    "slate": ((50, 54, 62), (86, 92, 102), (128, 134, 142), (172, 178, 184), (220, 224, 226)),
    "autumn": ((72, 48, 44), (122, 76, 60), (166, 112, 80), (198, 158, 116), (232, 208, 170)),
    "mint": ((46, 84, 88), (92, 138, 134), (144, 184, 172), (192, 218, 204), (232, 242, 232)),
    "rose": ((92, 58, 74), (142, 98, 112), (190, 146, 152), (222, 188, 186), (246, 226, 220)),
}
TRANSITIONS = ("cut", "dissolve", "fade", "fade_white")
OVERLAYS = ("title", "subtitle", "watermark", "logo", "slide")
PLACES = ("top_left", "top_right", "bottom_left", "bottom_right", "top", "bottom", "centre")

# kind of defect -> (default strength, what the strength is, name among the quality issues of Waver 3.2 or "")
DEFECTS: dict[str, tuple[float, str, str]] = {
    "blur": (0.011, "Gaussian sigma in short sides", "dark_or_blurry"),
    "dark": (0.16, "gain on the sRGB values", "dark_or_blurry"),
    "overexposed": (2.1, "gain on the sRGB values before they clip at white", "overexposed"),
    "color_imbalance": (0.5, "pull towards one colour, 0 to 1", "color_imbalance"),
    "noise": (24.0, "standard deviation in 8-bit levels", "low_visual_quality"),
    "slow_motion": (4.0, "times slower, whole; every frame is repeated", "slow_motion"),
    "slow_motion_blend": (4.0, "times slower, whole; frames between are blends", "slow_motion"),
    "fast_motion": (4.0, "times faster", "fast_motion"),
    "image_animation": (1.0, "unused; the scene stands still, only the camera moves", "image_animation"),
    "still": (1.0, "unused; every frame is the same", ""),
    "stutter": (5.0, "frames frozen out of every 12, then a jump back to true time", "unstable_motion"),
    "unstable_motion": (0.012, "hand shake on top of the camera's move, rms in short sides", "unstable_motion"),
    "subject_cutoff": (0.5, "part of the first shape beyond the right edge at mid-shot, 0 to 1", "subject_cutoff"),
    "perspective_change": (0.5, "when the viewpoint jumps, as a part of the clean shot", "perspective_change"),
}


def _one_of(what: str, value: str, allowed: tuple[str, ...] | dict) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} is unknown; use one of {', '.join(allowed)}")


def _positive(what: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{what} must be above 0, not {value}")


@dataclass(frozen=True)
class Shape:
    """One coloured shape; ``size`` is its diameter, ``text`` is printed on it and moves with it.

    ``at_edge`` tells what happens at the rim of the picture that the shot opens with: "leave" (go on, out of sight),
    "bounce" (the whole shape stays inside) or "wrap" (leave on one side, come back on the other).
    """

    colour: str = "red"
    kind: str = "disc"
    direction: str = "rest"
    size_short_sides: float = 0.24
    speed_short_sides_per_s: float = 0.0
    start_short_sides: tuple[float, float] = (0.0, 0.0)
    at_edge: str = "leave"
    text: str = ""

    def __post_init__(self) -> None:
        _one_of("colour", self.colour, COLOURS)
        _one_of("shape", self.kind, SHAPE_KINDS)
        _one_of("direction", self.direction, DIRECTIONS)
        _one_of("at_edge", self.at_edge, ("leave", "bounce", "wrap"))
        _positive("size_short_sides", self.size_short_sides)
        if self.speed_short_sides_per_s < 0 or (self.direction == "rest") != (self.speed_short_sides_per_s == 0):
            raise ValueError("a shape at rest has speed 0, and every other shape a speed above 0")


@dataclass(frozen=True)
class Background:
    """A procedural world texture; ``text`` is painted on the world itself (scene text: it moves with the camera)."""

    kind: str = "terrain"
    palette: str = "meadow"
    text: str = ""

    def __post_init__(self) -> None:
        _one_of("background", self.kind, BACKGROUNDS)
        _one_of("palette", self.palette, PALETTES)


@dataclass(frozen=True)
class Camera:
    """``pan_right`` turns the camera right, so the picture moves left; ``tilt_up`` makes it move down.

    The rate serves pans and tilts, the zoom factor both zooms (a ``zoom_out`` starts close and ends at zoom 1), the
    shake amplitude (rms of the shift; the roll follows it) only ``shake``.
    """

    kind: str = "static"
    rate_short_sides_per_s: float = 0.10
    zoom_factor_per_s: float = 1.07
    shake_rms_short_sides: float = 0.012

    def __post_init__(self) -> None:
        _one_of("camera", self.kind, CAMERAS)
        _positive("rate_short_sides_per_s", self.rate_short_sides_per_s)
        _positive("shake_rms_short_sides", self.shake_rms_short_sides)
        if not self.zoom_factor_per_s > 1:
            raise ValueError(f"zoom_factor_per_s must be above 1 for zooms in and out, not {self.zoom_factor_per_s}")


@dataclass(frozen=True)
class Defect:
    """Something wrong with a shot. ``strength`` has the unit that ``DEFECTS`` states; None is the default there."""

    kind: str
    strength: float | None = None

    def __post_init__(self) -> None:
        _one_of("defect", self.kind, DEFECTS)
        _positive("strength", self.value)
        if self.kind.startswith("slow_motion") and self.value != int(self.value):
            raise ValueError(f"{self.kind} repeats frames, so its strength must be whole, not {self.value}")

    @property
    def value(self) -> float:
        return DEFECTS[self.kind][0] if self.strength is None else self.strength


@dataclass(frozen=True)
class Overlay:
    """Something burned into the picture: on a shot (fades with it) or on a video (over all of it, transitions too).

    ``lines``: the lines of a title or slide; for a subtitle one line after another, ``period_s`` each; the text of a
    watermark. A ``logo`` is a drawn glyph and needs none.
    """

    kind: str
    lines: tuple[str, ...] = ()
    place: str = "bottom_right"
    height_short_sides: float = 0.06
    opacity: float = 1.0
    period_s: float = 2.0

    def __post_init__(self) -> None:
        _one_of("overlay", self.kind, OVERLAYS)
        _one_of("place", self.place, PLACES)
        _positive("height_short_sides", self.height_short_sides)
        _positive("period_s", self.period_s)
        if not 0 < self.opacity <= 1:
            raise ValueError(f"opacity must be in (0, 1], not {self.opacity}")
        if self.kind != "logo" and not any(line.strip() for line in self.lines):
            raise ValueError(f"an overlay of kind {self.kind!r} needs text in lines")


@dataclass(frozen=True)
class Shot:
    """One take. ``seed`` draws its texture and shake; shots with equal seed and background share one world."""

    duration_s: float = 3.0
    background: Background = Background()
    shapes: tuple[Shape, ...] = ()
    camera: Camera = Camera()
    defects: tuple[Defect, ...] = ()
    overlays: tuple[Overlay, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _positive("duration_s", self.duration_s)
        kinds = [defect.kind for defect in self.defects]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"a defect is listed twice: {kinds}")
        if "subject_cutoff" in kinds and not self.shapes:
            raise ValueError("subject_cutoff needs a shape to cut off")

    def defect(self, kind: str) -> float | None:
        """Strength of this kind of defect, or None where the shot is free of it."""
        return next((defect.value for defect in self.defects if defect.kind == kind), None)


@dataclass(frozen=True)
class Transition:
    """Between two shots. A gradual one adds ``duration_frames`` frames, each of them a true blend."""

    kind: str = "cut"
    duration_frames: int = 0

    def __post_init__(self) -> None:
        _one_of("transition", self.kind, TRANSITIONS)
        if (self.kind == "cut") != (self.duration_frames == 0) or self.duration_frames < 0:
            raise ValueError(f"a cut lasts 0 frames and a {self.kind} at least 1, not {self.duration_frames}")


@dataclass(frozen=True)
class Border:
    """Black borders in pixels, inside the stated size of the video."""

    top_px: int = 0
    bottom_px: int = 0
    left_px: int = 0
    right_px: int = 0

    def __post_init__(self) -> None:
        if min(self.top_px, self.bottom_px, self.left_px, self.right_px) < 0:
            raise ValueError(f"borders cannot be negative: {self}")


@dataclass(frozen=True)
class File:
    """How the file is made: a still image (".png"), a byte copy of another video's file, or a broken one."""

    suffix: str = ".mp4"
    crf: int = 18
    copy_of: str = ""
    near_duplicate_of: str = ""
    broken: bool = False

    def __post_init__(self) -> None:
        _one_of("suffix", self.suffix, (".mp4", ".png"))


@dataclass(frozen=True)
class Video:
    """A whole file. ``transitions`` has one entry between every two shots; an empty tuple means cuts."""

    name: str
    shots: tuple[Shot, ...]
    transitions: tuple[Transition, ...] = ()
    width_px: int = 640
    height_px: int = 360
    fps: Fraction = Fraction(24)
    overlays: tuple[Overlay, ...] = ()
    border: Border = Border()
    fade_in_frames: int = 0
    fade_out_frames: int = 0
    seed: int = 0
    file: File = File()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", Fraction(self.fps))
        if not self.shots:
            raise ValueError(f"video {self.name!r} has no shots")
        if not self.transitions:
            object.__setattr__(self, "transitions", (Transition(),) * (len(self.shots) - 1))
        if len(self.transitions) != len(self.shots) - 1:
            raise ValueError(f"{len(self.shots)} shots need {len(self.shots) - 1} transitions")
        if self.width_px % 2 or self.height_px % 2 or min(self.content_size_px) < 16:
            raise ValueError(f"width and height must be even and leave 16 px within the borders: {self.name!r}")
        _positive("fps", float(self.fps))
        if min(self.fade_in_frames, self.fade_out_frames) < 0:
            raise ValueError("fade_in_frames and fade_out_frames cannot be negative")

    @property
    def content_size_px(self) -> tuple[int, int]:
        """Width and height of the picture within the black borders."""
        border = self.border
        return self.width_px - border.left_px - border.right_px, self.height_px - border.top_px - border.bottom_px

    @property
    def short_side_px(self) -> int:
        """One "short side" in pixels."""
        return min(self.content_size_px)
