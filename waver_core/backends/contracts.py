"""What a stage may ask of a backend. Implementations: `embedded/` (no weights) and `pretrained/`.

Every backend has a `fingerprint`: name, version and whatever else changes its numbers; it is written beside the scores.
Frames are uint8 [T, H, W, 3] RGB throughout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class FrameEmbedder(Protocol):
    """Descriptors whose cosine tells whether two frames show the same scene (Waver §3.1: DINOv2)."""

    fingerprint: str
    short_side_px: int

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [T, D] of unit length."""


@runtime_checkable
class FlowEstimator(Protocol):
    """Dense optical flow (Waver §3.1: RAFT)."""

    fingerprint: str

    def flow(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [T-1, H, W, 2], (x, y) in pixels from each frame to the next."""


@runtime_checkable
class ForegroundSegmenter(Protocol):
    """Which pixels belong to what moves by itself."""

    fingerprint: str

    def segment(self, frames: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """frames uint8 [T, H, W, 3], flow residual float32 [T-1, h, w] in px of the frames' size -> bool [T-1, h, w]."""


class TextBox(NamedTuple):
    """An upright box around text, in fractions of width and height, and the detector's confidence."""

    left: float
    top: float
    right: float
    bottom: float
    score: float

    @property
    def area(self) -> float:
        """Share of the frame that the box covers."""
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)


@runtime_checkable
class TextDetector(Protocol):
    """Where text stands in a frame; it need not be read."""

    fingerprint: str

    def detect(self, frame: np.ndarray) -> list[TextBox]:
        """uint8 [H, W, 3] -> boxes."""


class Overlay(NamedTuple):
    """Something that stays still while the picture moves: how sure, and where (fractions of width and height)."""

    probability: float | None
    """None where the picture does not move enough to tell."""
    area_ratio: float
    box: tuple[float, float, float, float] | None


@runtime_checkable
class WatermarkScorer(Protocol):
    """Whether a logo or watermark lies over the picture."""

    fingerprint: str

    def score(self, frames: np.ndarray) -> Overlay:
        """uint8 [T, H, W, 3] of one clip, or of several shots of one source -> verdict."""


class Aesthetics(NamedTuple):
    """Scores of T frames: `score` float32 [T] on the scale 1 to 10, and its parts, each float32 [T]."""

    score: np.ndarray
    parts: dict[str, np.ndarray]


@runtime_checkable
class AestheticScorer(Protocol):
    """How good a frame looks as a photograph."""

    fingerprint: str

    def score(self, frames: np.ndarray) -> Aesthetics:
        """uint8 [T, H, W, 3] -> scores per frame."""


class ClipView(NamedTuple):
    """What a judge or captioner sees of one clip: frames uint8 [T, H, W, 3], their times in seconds from the start of the
    source's video stream [T], and the clip's row so far (span, kind, and the columns of earlier stages; may be empty). `large`:
    a few larger frames [N, h, w, 3] of the same clip, where text is to be read; without them it is read from `rgb`."""

    rgb: np.ndarray
    times_s: np.ndarray
    row: Mapping[str, Any]
    large: np.ndarray | None = None


ISSUES = (
    "low_visual_quality",
    "black_border",
    "text_overlay",
    "watermark",
    "slow_motion",
    "fast_motion",
    "perspective_change",
    "unstable_motion",
    "subject_cutoff",
    "overexposed",
    "dark_or_blurry",
    "image_animation",
    "color_imbalance",
)
"""The quality issues of Waver §3.2 and §3.5: the first eight are asked at 480p, twelve at 720p, all thirteen at CT."""


class Quality(NamedTuple):
    """Verdict on one clip: the probability of every name in `ISSUES`, and that of high quality; all in [0, 1]."""

    issues: dict[str, float]
    high_quality: float


@runtime_checkable
class QualityJudge(Protocol):
    """Which quality issues a clip has (Waver §3.2: VideoLLaMA3, fine-tuned)."""

    fingerprint: str

    def judge(self, clips: Sequence[ClipView]) -> list[Quality | Exception]:
        """One verdict per clip, in order; a clip that cannot be judged gives the exception that says why."""


STYLES = ("real", "anime_2d", "anime_3d", "game", "cg", "painting", "other")
"""The words of `Caption.style` for captioners that judge it (Waver §4.5); `tags.style` in pipelines.yaml turns them into tags."""


class SubAction(NamedTuple):
    """Something that happens in a clip, with its start and end in seconds from the clip's own start."""

    text: str
    start_s: float
    end_s: float


class Caption(NamedTuple):
    """What a clip shows (Waver §3.3). `camera` is one of `waver_core.camera.LABELS`; `spatial` are sentences such as
    "the red disc is to the left of the blue square", always from the viewer's side. `style` is one of `STYLES`, or what
    the clip's row gave, or empty where it is not known."""

    text: str
    short: str
    sub_actions: tuple[SubAction, ...]
    camera: str
    style: str
    spatial: tuple[str, ...]


@runtime_checkable
class Captioner(Protocol):
    """Describes clips (Waver §3.3: Qwen2.5-VL, fine-tuned)."""

    fingerprint: str

    def caption(self, clips: Sequence[ClipView]) -> list[Caption | Exception]:
        """One caption per clip, in order; a clip that cannot be captioned gives the exception that says why."""


class ActionLabel(NamedTuple):
    """A path in the taxonomy of actions; all three are "none" where a caption names no action of it."""

    level1: str
    level2: str
    level3: str


NO_ACTION = ActionLabel("none", "none", "none")


@runtime_checkable
class ActionLabeler(Protocol):
    """Names the action that a caption tells of (Waver §3.4: Qwen2.5-32B-Instruct)."""

    fingerprint: str

    def label(self, captions: Sequence[str]) -> list[ActionLabel | Exception]:
        """One label per caption, in order; a caption that cannot be labelled gives the exception that says why."""


@runtime_checkable
class VideoAutoencoder(Protocol):
    """Pixels to latents and back (Waver §2: the Wan 2.1 VAE). Causal: the first latent frame sees the first frame only."""

    fingerprint: str

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [T, H, W, 3], T = 1 + 4k, H and W multiples of 8 -> float32 [16, 1+k, H/8, W/8], normalised (about unit
        variance over all). Clips may differ in shape. Raises `UserError` for a shape that has no latent."""

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 [16, 1+k, h, w] -> uint8 [1+4k, 8h, 8w, 3]."""


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts as sequences of vectors (Waver §2.1: flan-t5-xxl and Qwen2.5-32B-Instruct)."""

    fingerprint: str
    dim: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """float32 [L, dim] per text, L its true number of tokens: at least 1 (the empty text too), no padding, and what
        stands beyond the encoder's `max_tokens` is cut off. A text's vectors do not depend on its neighbours in the batch."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """Semantic features of a clip, to which the DiT's own are aligned (Waver §4.2: Qwen2.5-VL)."""

    fingerprint: str
    dim: int

    def extract(self, clips: Sequence[np.ndarray], grids: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] and the wanted grid (Tf, Hf, Wf) of each clip -> float32 [Tf, Hf, Wf, dim]."""


class Rewriting(NamedTuple):
    """A prompt to be rewritten for a video of `seconds` (0: an image). `style_words` are those of the style that was asked for
    (`tags.style` in pipelines.yaml), empty where none was."""

    prompt: str
    seconds: float
    style_words: str = ""

    def tagged(self, text: str) -> str:
        """A text with the style words before it as a sentence, as in training captions (Waver §4.5); unless it begins so."""
        words = self.style_words.strip().rstrip(".!?").rstrip()
        if not words or re.match(re.escape(words) + r"(?!\w)", text.lstrip(), re.IGNORECASE):
            return text
        return f"{words}. {text}".rstrip()


@runtime_checkable
class PromptRewriter(Protocol):
    """Makes prompts read like the captions of the training set (Waver §4.6: a large language model).

    What the user said stays, in other words perhaps; only what is left open is added. Every implementation takes the option
    `max_chars`; none makes a prompt longer than that.
    """

    fingerprint: str

    def rewrite(self, requests: Sequence[Rewriting]) -> list[str | Exception]:
        """One prompt per request, in order, style words first; one that cannot be had gives the exception that says why."""
