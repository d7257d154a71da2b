"""What is known about a synthetic video, as plain JSON-able values and as flat rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from waver_core.synthetic import geometry
from waver_core.synthetic.overlays import stamp
from waver_core.synthetic.scenes import COLOURS, DEFECTS, DIRECTIONS, Overlay, Video
from waver_core.synthetic.timeline import Span, clean_frames, n_frames, timeline

_ISSUE_OF_OVERLAY = {
    "title": "text_overlay",
    "subtitle": "text_overlay",
    "slide": "text_overlay",
    "watermark": "watermark",
    "logo": "watermark",
}


def truth(video: Video) -> dict[str, Any]:
    """Everything that is known about a video, from its description alone (nothing is rendered).

    Frames are numbered from 0 and spans are ``[start_frame, end_frame)``. ``shots`` are the clean parts. A cut has
    ``start_frame == end_frame``, the first frame of the new shot; the frames of a gradual transition are all blends.
    Speeds are in px per frame: ``world_`` at zoom 1 with the camera held still, ``image_`` as seen on screen.
    ``quality_issues`` uses the words of Waver 3.2; ``clean`` means no issue and no defect at all.
    """
    spans = timeline(video)
    return {
        "name": video.name,
        "file": video.name + video.file.suffix,
        "kind": "image" if video.file.suffix == ".png" else "video",
        "readable": not video.file.broken,
        "exact_duplicate_of": video.file.copy_of,
        "near_duplicate_of": video.file.near_duplicate_of,
        "n_frames": n_frames(video),
        "fps": float(video.fps),
        "fps_fraction": str(video.fps),
        "duration_s": float(n_frames(video) / video.fps),
        "width_px": video.width_px,
        "height_px": video.height_px,
        "border_px": {
            "top": video.border.top_px,
            "bottom": video.border.bottom_px,
            "left": video.border.left_px,
            "right": video.border.right_px,
        },
        "overlays": [_overlay(video, overlay) for overlay in video.overlays],
        "shots": [_shot(video, span) for span in spans if span.kind == "shot"],
        "transitions": [
            {"kind": span.kind, "start_frame": span.start_frame, "end_frame": span.end_frame}
            for span in spans
            if span.kind != "shot"
        ],
    }


def quality_issues(video: Video, index: int) -> list[str]:
    """Sorted names of the quality issues (Waver 3.2) that a shot has, those of the whole video included."""
    shot = video.shots[index]
    issues = {DEFECTS[defect.kind][2] for defect in shot.defects} - {""}
    issues |= {_ISSUE_OF_OVERLAY[overlay.kind] for overlay in (*shot.overlays, *video.overlays)}
    if shot.camera.kind == "shake":
        issues.add("unstable_motion")
    if video.content_size_px != (video.width_px, video.height_px):
        issues.add("black_border")
    return sorted(issues)


def _overlay(video: Video, overlay: Overlay) -> dict[str, Any]:
    stamps = [stamp(overlay, line, video.content_size_px) for line in range(len(overlay.lines) or 1)]
    boxes = np.array([drawn.box_px for drawn in stamps if drawn is not None])
    offset = np.array([video.border.left_px, video.border.top_px] * 2)
    x0, y0, x1, y1 = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]) + offset
    return {
        "kind": overlay.kind,
        "lines": list(overlay.lines),
        "period_s": overlay.period_s if overlay.kind == "subtitle" else None,
        "opacity": overlay.opacity,
        "box_px": [int(x0), int(y0), int(x1), int(y1)],
        "area_fraction": float((x1 - x0) * (y1 - y0) / (video.width_px * video.height_px)),
    }


def _steady_frames(video: Video, index: int) -> int:
    """Clean frames before the viewpoint jumps, or all of them: what the speeds are measured over."""
    n = clean_frames(video, video.shots[index])
    jump = video.shots[index].defect("perspective_change")
    return n if jump is None else max(1, round(n * jump))


def _speed(path_px: np.ndarray) -> tuple[list[float], float]:
    """Mean velocity [x, y] and mean speed of a path [T, 2], in px per frame."""
    steps = np.diff(path_px, axis=0)
    if not len(steps):
        return [0.0, 0.0], 0.0
    return _rounded(steps.mean(axis=0)), round(float(np.linalg.norm(steps, axis=1).mean()), 4)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) + 0.0 for value in values]


def _shot(video: Video, span: Span) -> dict[str, Any]:
    index = span.after
    assert index is not None
    shot = video.shots[index]
    fps = float(video.fps)
    background, speed = _speed(geometry.background_path_px(video, index)[: _steady_frames(video, index)])
    zooming = {"zoom_in": 1, "zoom_out": -1}.get(shot.camera.kind, 0)
    factor = geometry.time_factor(shot)
    return {
        "index": index,
        "start_frame": span.start_frame,
        "end_frame": span.end_frame,
        "start_s": span.start_frame / fps,
        "end_s": span.end_frame / fps,
        "camera": shot.camera.kind,
        "background_velocity_px_per_frame": background,
        "background_speed_px_per_frame": speed,
        "zoom_per_frame": shot.camera.zoom_factor_per_s ** (zooming * factor / fps),
        "background": shot.background.kind,
        "palette": shot.background.palette,
        "scene_text": [text for text in (shot.background.text, *(shape.text for shape in shot.shapes)) if text],
        "shapes": [_shape(video, index, number) for number in range(len(shot.shapes))],
        "overlays": [_overlay(video, overlay) for overlay in shot.overlays],
        "defects": [{"kind": d.kind, "strength": d.value, "unit": DEFECTS[d.kind][1]} for d in shot.defects],
        "quality_issues": quality_issues(video, index),
        "clean": not shot.defects and not quality_issues(video, index),
    }


def _shape(video: Video, index: int, number: int) -> dict[str, Any]:
    shot = video.shots[index]
    shape = shot.shapes[number]
    factor = 0.0 if shot.defect("image_animation") is not None else geometry.time_factor(shot)
    px_per_frame = shape.speed_short_sides_per_s * video.short_side_px / float(video.fps) * factor
    path = geometry.shape_path_px(video, index, number)
    velocity, speed = _speed(path[: _steady_frames(video, index)])
    return {
        "colour": shape.colour,
        "srgb": list(COLOURS[shape.colour]),
        "kind": shape.kind,
        "direction": shape.direction,
        "size_px": shape.size_short_sides * video.short_side_px,
        "at_edge": shape.at_edge,
        "text": shape.text,
        "world_velocity_px_per_frame": _rounded(np.array(DIRECTIONS[shape.direction]) * px_per_frame),
        "world_speed_px_per_frame": round(px_per_frame, 4),
        "image_velocity_px_per_frame": velocity,
        "image_speed_px_per_frame": speed,
        "first_centre_px": _rounded(path[0]),
        "last_centre_px": _rounded(path[-1]),
    }


def truth_rows(known: dict[str, Any]) -> list[dict[str, Any]]:
    """A truth as flat rows, one per shot and per transition in the order of the video; lists become "a,b"."""
    common = {key: known[key] for key in ("name", "file", "readable", "exact_duplicate_of", "near_duplicate_of")}
    common |= {key: known[key] for key in ("n_frames", "fps", "width_px", "height_px")}
    common["media_kind"] = known["kind"]
    rows = []
    for shot in known["shots"]:
        shape = shot["shapes"][0] if shot["shapes"] else None
        row = {
            "row": "shot",
            **{key: shot[key] for key in ("start_frame", "end_frame", "camera", "background", "palette", "clean")},
            "background_speed_px_per_frame": shot["background_speed_px_per_frame"],
            "n_shapes": len(shot["shapes"]),
            "defects": ",".join(defect["kind"] for defect in shot["defects"]),
            "quality_issues": ",".join(shot["quality_issues"]),
            "overlays": ",".join(overlay["kind"] for overlay in (*known["overlays"], *shot["overlays"])),
            "scene_text": ",".join(shot["scene_text"]),
        }
        if shape is not None:
            row |= {"colour": shape["colour"], "shape": shape["kind"], "direction": shape["direction"]}
            row |= {key: shape[key] for key in ("world_speed_px_per_frame", "image_speed_px_per_frame")}
        rows.append(common | row)
    for transition in known["transitions"]:
        spans = {key: transition[key] for key in ("start_frame", "end_frame")}
        rows.append(common | {"row": "transition", "transition": transition["kind"], **spans})
    for row in rows:
        row["start_s"], row["end_s"] = row["start_frame"] / known["fps"], row["end_frame"] / known["fps"]
    return sorted(rows, key=lambda row: (row["start_frame"], row["end_frame"]))
