"""Backends that hold conversations: their options, and the engine that answers them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from waver_core.backends.pretrained import _chat
from waver_core.backends.pretrained import _chat_engines as engines
from waver_core.backends.pretrained._chat import ChatEngine, Conversation
from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import ConfigError
from waver_core.prompts import Prompt

ENGINES = ("transformers", "openai", "vllm")


class ChatBackend(Pretrained):
    """Base of backends that hold conversations.

    engine: "transformers" loads the checkpoint here; "openai" asks an endpoint that speaks OpenAI's chat dialect (then no
    checkpoint and no torch is needed); "vllm" leaves the asking to the funnel's executor, which uses the pure parts:
    `messages`, `json_schema`, `max_tokens`, `parse` and `repair_messages`.
    base_url, model: the endpoint and the name it knows the model by. api_key_env: the NAME of the environment variable that
    holds its key; empty for an endpoint without one. structured: whether the endpoint is sent the JSON schema.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    known: ClassVar[tuple[Checkpoint, ...]] = ()
    """Checkpoints of which size and licence are known."""
    name: ClassVar[str] = ""
    reads_images: ClassVar[bool] = True
    media_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the checkpoint's processor, beyond its own configuration."""

    def __init__(
        self,
        *,
        checkpoint: str,
        max_tokens: int,
        revision: str | None = None,
        engine: str = "transformers",
        base_url: str = "",
        model: str = "",
        api_key_env: str = "",
        structured: bool = True,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        attempts: int = 5,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 4,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        if engine not in ENGINES:
            raise ConfigError(f"{self.name}: engine must be one of {', '.join(ENGINES)}, not '{engine}'")
        if engine == "openai" and not (base_url and model):
            raise ConfigError(f"{self.name}: the engine openai needs the options base_url and model")
        self.checkpoint = known_or(checkpoint, self.known, revision)
        self.max_tokens, self.engine_name = max_tokens, engine
        if engine == "openai":
            self.packages = ("httpx2",)  # type: ignore[misc]  # all that this one needs
        self._endpoint: dict[str, Any] = {
            "base_url": base_url,
            "model": model,
            "api_key_env": api_key_env,
            "structured": structured,
            "concurrency": concurrency,
            "timeout_s": timeout_s,
            "attempts": attempts,
        }

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoint, unless an endpoint has it."""
        return () if self.engine_name == "openai" else (self.checkpoint,)

    def chat_identity(self, *prompts: Prompt, **parameters: Any) -> str:
        """The fingerprint. An engine of our own leaves no trace in it; of an endpoint only the model's name is known."""
        named = {"model": self._endpoint["model"]} if self.engine_name == "openai" else {}
        asked = ",".join(f"{prompt.name}:{prompt.digest}" for prompt in prompts)
        return self.identity(f"{self.name}-1", **named, prompts=asked, **parameters, max_tokens=self.max_tokens)

    @cached_property
    def engine(self) -> ChatEngine:
        """What answers; made at the first use, inside the worker."""
        if self.engine_name != "vllm":
            self.require()
        if self.engine_name == "openai":
            return engines.OpenAIChat(self.module("httpx2"), **self._endpoint)
        if self.engine_name == "transformers":
            return engines.TransformersChat(self, self.checkpoint.locate(), self.reads_images, self.media_options)
        raise ConfigError(f"{self.name}: the engine vllm runs inside the funnel's executor, not by direct calls")

    @staticmethod
    def repair_messages(messages: Conversation, answer: str, complaint: str) -> Conversation:
        """See `_chat.repair_messages`."""
        return _chat.repair_messages(messages, answer, complaint)
