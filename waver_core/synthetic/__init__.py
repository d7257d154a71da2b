"""Procedural videos with exactly known ground truth, for the demo, the tests and the benchmarks.

Describe a video with frozen dataclasses (`scenes`), or have one made from a seed (`random_video`, `single_shot`,
`demo_collection`, `training_collection`); then `render` its frames, ask for its `truth`, or write it. From the shell:
``python -m waver_core.synthetic --output DIR``.
"""

from waver_core.synthetic.casting import random_video, single_shot
from waver_core.synthetic.collection import demo_collection
from waver_core.synthetic.geometry import background_path_px, shape_path_px
from waver_core.synthetic.ground_truth import quality_issues, truth, truth_rows
from waver_core.synthetic.render import render
from waver_core.synthetic.scenes import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    DEFECTS,
    DIRECTIONS,
    PALETTES,
    SHAPE_KINDS,
    Background,
    Border,
    Camera,
    Defect,
    File,
    Overlay,
    Shape,
    Shot,
    Transition,
    Video,
)
from waver_core.synthetic.training_collection import TRAINING_COLOURS, TRAINING_DIRECTIONS, training_collection
from waver_core.synthetic.writing import write_collection, write_video

__all__ = [
    "BACKGROUNDS",
    "CAMERAS",
    "COLOURS",
    "DEFECTS",
    "DIRECTIONS",
    "PALETTES",
    "SHAPE_KINDS",
    "TRAINING_COLOURS",
    "TRAINING_DIRECTIONS",
    "Background",
    "Border",
    "Camera",
    "Defect",
    "File",
    "Overlay",
    "Shape",
    "Shot",
    "Transition",
    "Video",
    "background_path_px",
    "demo_collection",
    "quality_issues",
    "random_video",
    "render",
    "shape_path_px",
    "single_shot",
    "training_collection",
    "truth",
    "truth_rows",
    "write_collection",
    "write_video",
]
