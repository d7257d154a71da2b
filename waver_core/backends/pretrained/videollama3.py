"""Quality judge on VideoLLaMA3 (Waver §3.2), which the report fine-tunes on a million annotated clips.

The published checkpoints were not trained for these questions; their probabilities rank clips, but a threshold needs
calibration on annotated clips of one's own. For a fine-tuned model give its folder as `checkpoint`.
"""

from __future__ import annotations

from typing import Any

from waver_core.backends.pretrained._yes_no import YesNoJudge
from waver_core.checkpoints import Checkpoint
from waver_core.registry import register


@register("quality_judge", "videollama3")
class VideoLlama3Judge(YesNoJudge):
    """VideoLLaMA3 in transformers' own format; the originals of DAMO-NLP-SG need remote code and do not load here.

    The known repositories are conversions by the model's co-author. Options: see `YesNoJudge`.
    """

    packages = ("torch", "torchvision", "transformers")
    name = "videollama3"
    known = (
        Checkpoint("lkhl/VideoLLaMA3-2B-Image-HF", 3_936),
        Checkpoint("lkhl/VideoLLaMA3-7B-Image-HF"),
    )

    def __init__(self, *, checkpoint: str = "lkhl/VideoLLaMA3-2B-Image-HF", frames: int = 16, **options: Any) -> None:
        super().__init__(checkpoint=checkpoint, frames=frames, **options)
