"""Captions with Qwen2.5-VL (Waver §3.3), as published or fine-tuned: give the folder as `checkpoint`."""

from __future__ import annotations

from typing import Any

from waver_core.backends.pretrained._captions import ChatCaptioner
from waver_core.checkpoints import Checkpoint
from waver_core.registry import register


@register("captioner", "qwen2_5_vl")
class Qwen25VLCaptioner(ChatCaptioner):
    """Qwen2.5-VL, 7B by default; a frame of 640x360 costs about 300 tokens. Options: see `ChatCaptioner`, `ChatBackend`."""

    packages = ("torch", "torchvision", "transformers")
    name = "qwen2_5_vl"
    known = (
        Checkpoint("Qwen/Qwen2.5-VL-3B-Instruct", None, "Qwen Research (non-commercial)"),
        Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", 16_596, "Apache-2.0"),
        Checkpoint("Qwen/Qwen2.5-VL-72B-Instruct", None, "Qwen"),
    )

    def __init__(
        self,
        *,
        checkpoint: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        prompt: str = "captioner.v1",
        image_prompt: str = "captioner_image.v1",
        **options: Any,
    ) -> None:
        super().__init__(checkpoint=checkpoint, prompt=prompt, image_prompt=image_prompt, **options)
