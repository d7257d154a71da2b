"""Text vectors of flan-t5-xxl (Raffel et al., 2020; Chung et al., 2022; Waver §2): the encoder's last hidden states."""

from __future__ import annotations

from typing import Any

from waver_core.backends.pretrained._text_vectors import TextVectors
from waver_core.checkpoints import Checkpoint
from waver_core.registry import register

_FILES = ("*.json", "*.model", "*.safetensors")


@register("text_encoder", "t5")
class T5(TextVectors):
    """The decoder's weights are not loaded. Every text ends with `</s>`, a cut one too, so the empty text is that token."""

    name = "t5"
    architecture = "T5EncoderModel"
    known = (
        Checkpoint("google/flan-t5-small", 311, "Apache-2.0", _FILES),
        Checkpoint("google/flan-t5-base", 993, "Apache-2.0", _FILES),
        Checkpoint("google/flan-t5-large", 3_136, "Apache-2.0", _FILES),
        Checkpoint("google/flan-t5-xl", 11_402, "Apache-2.0", _FILES),
        Checkpoint("google/flan-t5-xxl", 45_100, "Apache-2.0", _FILES),
    )

    def __init__(
        self,
        *,
        checkpoint: str = "google/flan-t5-xxl",
        revision: str | None = None,
        max_tokens: int = 256,
        **runtime: Any,
    ) -> None:
        super().__init__(checkpoint=checkpoint, revision=revision, max_tokens=max_tokens, **runtime)

    def ids(self, tokenizer: Any, text: str) -> list[int]:
        """With the end token, within `max_tokens`."""
        found: list[int] = tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return found
