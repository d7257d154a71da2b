"""Frames of a synthetic video, one at a time, so that memory stays bounded by one or two shots' textures."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from waver_core.synthetic import geometry
from waver_core.synthetic.overlays import Stamp, lay_stamp, line_at, stamp
from waver_core.synthetic.scenes import Overlay, Shot, Video
from waver_core.synthetic.sprites import lay_sprite, sprite
from waver_core.synthetic.textures import world_texture
from waver_core.synthetic.timeline import blend_weights, clean_frames, shot_margins, timeline

MAX_TEXTURE_SIDE_PX = 6144  # beyond it the world is mirrored rather than painted


def render(video: Video) -> Iterator[np.ndarray]:
    """Yield every frame as uint8 RGB ``[height_px, width_px, 3]``, always the same bytes for the same video."""
    shots: dict[int, ShotRenderer] = {}
    stamps = _Stamps(video.overlays, video.content_size_px)
    for span in timeline(video):
        needed = {index for index in (span.before, span.after) if index is not None}
        for index in set(shots) - needed:
            del shots[index]
        for index in needed - set(shots):
            shots[index] = ShotRenderer(video, index)
        for step in range(span.n_frames):
            frame = _span_frame(video, shots, span.kind, step, span.n_frames, span.before, span.after)
            stamps.lay(frame, (span.start_frame + step) / float(video.fps))
            yield _with_border(video, frame)


def _span_frame(
    video: Video, shots: dict[int, ShotRenderer], kind: str, step: int, n: int, before: int | None, after: int | None
) -> np.ndarray:
    if kind == "shot":
        assert after is not None
        return shots[after].frame(step)
    weight_before, weight_after, white = blend_weights(kind, step, n)
    width, height = video.content_size_px
    frame = np.zeros((height, width, 3), np.uint8)
    a = shots[before].frame(clean_frames(video, video.shots[before]) + step) if before is not None else frame
    b = shots[after].frame(step - n) if after is not None else frame
    return cv2.addWeighted(a, weight_before, b, weight_after, 255 * white)


def _with_border(video: Video, frame: np.ndarray) -> np.ndarray:
    border = video.border
    if not (border.top_px or border.bottom_px or border.left_px or border.right_px):
        return frame
    return cv2.copyMakeBorder(
        frame, border.top_px, border.bottom_px, border.left_px, border.right_px, cv2.BORDER_CONSTANT, value=(0, 0, 0)
    )


class _Stamps:
    """Overlays drawn once each and laid on every frame."""

    def __init__(self, overlays: tuple[Overlay, ...], size_px: tuple[int, int]) -> None:
        self.overlays, self.size_px = overlays, size_px
        self.drawn: dict[tuple[int, int], Stamp | None] = {}

    def lay(self, frame: np.ndarray, time_s: float) -> None:
        for number, overlay in enumerate(self.overlays):
            key = number, line_at(overlay, time_s)
            if key not in self.drawn:
                self.drawn[key] = stamp(overlay, key[1], self.size_px)
            lay_stamp(frame, self.drawn[key])


class ShotRenderer:
    """One shot, ready to draw any of its frames (numbered from its first clean frame; negative ones lead in)."""

    def __init__(self, video: Video, index: int) -> None:
        self.video, self.index, self.shot = video, index, video.shots[index]
        lead, tail = shot_margins(video, index)
        self.lead = lead
        frames = np.arange(-lead, clean_frames(video, self.shot) + tail + 1)
        at = geometry.clock(video, index, frames)
        zooms = np.linalg.norm(geometry.view_matrices(video, index, at)[:, :, 1], axis=1) / video.short_side_px
        x0, y0, x1, y1 = bounds = geometry.world_bounds(video, index)
        # Drawn halfway between the widest and the closest view: neither aliased nor soft.
        scale = video.short_side_px * float(np.sqrt(zooms.min() * zooms.max()))
        self.px_per_unit = min(scale, MAX_TEXTURE_SIDE_PX / max(x1 - x0, y1 - y0))
        self.texture = world_texture(self.shot.background, [video.seed, self.shot.seed, 1], bounds, self.px_per_unit)
        self.texture_to_world = np.array(
            [[1 / self.px_per_unit, 0, x0], [0, 1 / self.px_per_unit, y0], [0, 0, 1]], dtype=np.float64
        )
        self.sprites = [
            sprite(shape, shape.size_short_sides * scale, geometry.shot_rng(video, self.shot, 5, number))
            for number, shape in enumerate(self.shot.shapes)
        ]
        self.stamps = _Stamps(self.shot.overlays, video.content_size_px)
        self.last_background: tuple[bytes, np.ndarray] | None = None

    def frame(self, number: int) -> np.ndarray:
        """Draw a frame, uint8 RGB of the size within the borders; the caller owns the array."""
        at = geometry.clock(self.video, self.index, np.array([number]))
        if self.shot.defect("slow_motion_blend") is not None:
            frame = self._blend_of_neighbours(at)
        else:
            frame = self._scene(at)
        frame = self._degrade(frame, number)
        self.stamps.lay(frame, number / float(self.video.fps))
        return frame

    def _blend_of_neighbours(self, at: geometry.Clock) -> np.ndarray:
        fps = float(self.video.fps)
        source = float(at.scene_s[0]) * fps
        low = int(np.floor(source + 1e-9))
        part = source - low
        first, second = (geometry.Clock(np.array([n / fps]), np.array([n / fps]), at.jumped) for n in (low, low + 1))
        if part < 1e-6:
            return self._scene(first)
        return cv2.addWeighted(self._scene(first), 1 - part, self._scene(second), part, 0)

    def _scene(self, at: geometry.Clock) -> np.ndarray:
        matrix = geometry.view_matrices(self.video, self.index, at)[0]
        frame = self._background(matrix)
        for number, (shape, drawn) in enumerate(zip(self.shot.shapes, self.sprites, strict=True)):
            world = geometry.shape_world_at(self.video, self.index, number, at)[0]
            linear = matrix[:, :2] * shape.size_short_sides
            lay_sprite(frame, drawn, np.column_stack([linear, matrix[:, :2] @ world + matrix[:, 2]]))
        return frame

    def _background(self, matrix: np.ndarray) -> np.ndarray:
        key = matrix.tobytes()
        if self.last_background is None or self.last_background[0] != key:
            to_picture = matrix @ self.texture_to_world
            size = self.video.content_size_px
            warped = cv2.warpAffine(self.texture, to_picture, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
            self.last_background = key, warped
        return self.last_background[1].copy()

    def _degrade(self, frame: np.ndarray, number: int) -> np.ndarray:
        """Photometric defects, before anything is burned in."""
        shot = self.shot
        if (sigma := shot.defect("blur")) is not None:
            frame = cv2.GaussianBlur(frame, (0, 0), sigma * self.video.short_side_px)
        if (gain := shot.defect("overexposed")) is not None:
            frame = cv2.convertScaleAbs(frame, alpha=gain)
        if (gain := shot.defect("dark")) is not None:
            frame = cv2.convertScaleAbs(frame, alpha=gain)
        if (pull := shot.defect("color_imbalance")) is not None:
            frame = _tint(frame, pull, shot)
        if (deviation := shot.defect("noise")) is not None:
            key = 0 if shot.defect("still") is not None else number + self.lead
            noise = geometry.shot_rng(self.video, shot, 3, key).standard_normal(frame.shape, dtype=np.float32)
            frame = np.clip(frame + noise * deviation, 0, 255).astype(np.uint8)
        return frame


def _tint(frame: np.ndarray, pull: float, shot: Shot) -> np.ndarray:
    """Pull all colours towards orange, green or violet, after the seed of the shot."""
    gains = ((1.35, 0.95, 0.15), (0.45, 1.25, 0.4), (1.1, 0.4, 1.3))[shot.seed % 3]
    levels = np.arange(256)[:, None] * (1 + (np.array(gains) - 1) * pull)
    table = np.clip(levels + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.LUT(frame, table[None]))
