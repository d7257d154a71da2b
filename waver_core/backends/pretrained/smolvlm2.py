"""SmolVLM2 for the small profile: a quality judge and a captioner that fit a laptop (2 GB of weights, 500M parameters).

Both share their code with the report's models, so a pipeline can be tried end to end before a GPU is at hand. Neither
was trained for these questions: take what it says for a rehearsal.
"""

from __future__ import annotations

from typing import Any

from waver_core.backends.pretrained._captions import ChatCaptioner
from waver_core.backends.pretrained._yes_no import YesNoJudge
from waver_core.checkpoints import Checkpoint
from waver_core.registry import register

_PACKAGES = ("torch", "torchvision", "transformers", "num2words")
_KNOWN = (
    Checkpoint("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", 1_035, "Apache-2.0"),
    Checkpoint("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 2_035, "Apache-2.0"),
    Checkpoint("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 8_995, "Apache-2.0"),
)
_DEFAULT = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"


@register("quality_judge", "smolvlm2")
class SmolVLM2Judge(YesNoJudge):
    """Probabilities of quality issues from SmolVLM2; a frame costs 64 tokens (500M), whatever its size."""

    packages = _PACKAGES
    name = "smolvlm2"
    known = _KNOWN

    def __init__(self, *, checkpoint: str = _DEFAULT, frames: int = 12, **options: Any) -> None:
        super().__init__(checkpoint=checkpoint, frames=frames, **options)


@register("captioner", "smolvlm2")
class SmolVLM2Captioner(ChatCaptioner):
    """Captions from SmolVLM2; answers in plain text, for at this size it seldom keeps to a form."""

    packages = _PACKAGES
    name = "smolvlm2"
    known = _KNOWN
    # Frames of a video are shown whole; by default the processor would cut each picture into up to 17 pieces.
    media_options = {"do_image_splitting": False}

    def __init__(
        self,
        *,
        checkpoint: str = _DEFAULT,
        prompt: str = "captioner_plain.v1",
        image_prompt: str = "captioner_plain_image.v1",
        **options: Any,
    ) -> None:
        defaults = {"answer": "text", "frames": 12, "max_tokens": 256}
        super().__init__(checkpoint=checkpoint, prompt=prompt, image_prompt=image_prompt, **{**defaults, **options})
