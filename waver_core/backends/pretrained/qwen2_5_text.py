"""Text vectors of Qwen2.5-32B-Instruct (Waver §2): the last hidden states, after the model's final norm.

After the norm, because the stream before it has a scale that differs from token to token and a few entries far above the rest.
Prompts go in as plain text. A chat template would put some twenty tokens of system prompt and roles, the same for every
text, before a prompt that nobody is asked to answer. One token does stand first, `<|endoftext|>`, which parts documents in
the model's training: a causal model of this family makes a sink for attention of whatever is first, with a state that says
nothing of its meaning, and that should not befall the first word of a prompt. Its vector is kept: it is the empty text's.
"""

from __future__ import annotations

from typing import Any

from waver_core.backends.pretrained._text_vectors import TextVectors
from waver_core.backends.pretrained.qwen2_5 import Qwen25Labeler
from waver_core.registry import register

FIRST_TOKEN = "<|endoftext|>"


@register("text_encoder", "qwen2_5")
class Qwen25Text(TextVectors):
    """Qwen2.5-Instruct, 32B by default (65 GB in bfloat16); the report does not say which layer it takes."""

    name = "qwen2_5-text"
    known = Qwen25Labeler.known
    architecture = "Qwen2Model"

    def __init__(
        self,
        *,
        checkpoint: str = "Qwen/Qwen2.5-32B-Instruct",
        revision: str | None = None,
        max_tokens: int = 256,
        **runtime: Any,
    ) -> None:
        super().__init__(checkpoint=checkpoint, revision=revision, max_tokens=max_tokens, **runtime)

    def ids(self, tokenizer: Any, text: str) -> list[int]:
        """`FIRST_TOKEN` and the text, within `max_tokens`."""
        words: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [tokenizer.convert_tokens_to_ids(FIRST_TOKEN), *words][: self.max_tokens]
