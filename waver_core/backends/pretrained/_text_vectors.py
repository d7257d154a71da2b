"""Hidden states of a language model as text vectors: what the encoders of T5 and Qwen2.5 share (Waver §2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import ConfigError


class TextVectors(Pretrained, ABC):
    """Texts go through padded on the right and masked; the vectors of the padding are cut off, so a text has as many as it
    has tokens, whatever its neighbours. `max_tokens` is the most that are kept of one text.
    """

    packages = ("torch", "transformers")
    name: ClassVar[str] = ""
    known: ClassVar[tuple[Checkpoint, ...]] = ()
    architecture: ClassVar[str] = ""
    """The class of transformers that is loaded."""

    def __init__(self, *, checkpoint: str, revision: str | None = None, max_tokens: int = 256, **runtime: Any) -> None:
        super().__init__(**runtime)
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
        self.max_tokens = max_tokens
        self._checkpoint = known_or(checkpoint, self.known, revision)
        self.fingerprint = self.identity(f"{self.name}-1", max_tokens=max_tokens)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The one that was chosen."""
        return (self._checkpoint,)

    @cached_property
    def dim(self) -> int:
        """Length of a vector, from the checkpoint's config; no weights are read. Raises `BackendUnavailable` without it."""
        self.require()
        config = self.module("transformers").AutoConfig.from_pretrained(self._checkpoint.locate(), local_files_only=True)
        return int(config.hidden_size)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder`: float32 [L, dim] per text."""
        self.require()
        torch, model, tokenizer = self.module("torch"), self._model, self._tokenizer
        ids = [self.ids(tokenizer, text) for text in texts]
        order = sorted(range(len(ids)), key=lambda k: len(ids[k]))  # texts of like length together: less padding
        vectors: list[np.ndarray] = [np.empty(0)] * len(ids)
        for part in self.batches(len(order)):
            places = order[part]
            longest = max(len(ids[k]) for k in places)
            tokens = torch.full((len(places), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(tokens)
            for row, k in enumerate(places):
                tokens[row, : len(ids[k])] = torch.tensor(ids[k])
                mask[row, : len(ids[k])] = 1
            with torch.inference_mode():
                states = model(input_ids=tokens.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
            for row, k in enumerate(places):
                vectors[k] = states[row, : len(ids[k])].float().cpu().numpy()
        return vectors

    @abstractmethod
    def ids(self, tokenizer: Any, text: str) -> list[int]:
        """A text's token ids, from 1 to `max_tokens` of them."""

    @cached_property
    def _tokenizer(self) -> Any:
        transformers = self.module("transformers")
        return transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)

    @cached_property
    def _model(self) -> Any:
        kind = getattr(self.module("transformers"), self.architecture)
        model = kind.from_pretrained(self._folder, dtype=self.dtype, local_files_only=True, use_safetensors=True)
        return model.to(self.device).eval()

    @property
    def _folder(self) -> Path:
        return self._checkpoint.locate()
