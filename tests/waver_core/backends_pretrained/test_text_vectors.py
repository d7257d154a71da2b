"""T5 and Qwen2.5 as text encoders, from small random checkpoints on disk: the library's own hidden states, without padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.waver_core.backends_pretrained import tiny_chat, tiny_encoders
from waver_core.errors import ConfigError
from waver_core.registry import create

pytestmark = pytest.mark.models
SAVERS = {"t5": tiny_encoders.save_t5, "qwen2_5": tiny_chat.save_qwen_text}
TEXTS = ["a red disc moves to the right", "", "ring", "the blue ring, left of the red disc, moves to the left.", "a red disc"]


@pytest.fixture(params=SAVERS)
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Builds the encoder of one family with options."""
    folder = SAVERS[request.param](tmp_path / request.param)
    return lambda **options: create("text_encoder", request.param, **{"checkpoint": folder, "device": "cpu", **options})


def test_t5_vectors_are_those_of_the_whole_model_s_encoder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    folder = tiny_encoders.save_t5(tmp_path / "t5")
    found = create("text_encoder", "t5", checkpoint=folder, device="cpu").encode(TEXTS)
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, vectors in zip(TEXTS, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert inputs["input_ids"][0, -1] == tokenizer.eos_token_id
        with torch.inference_mode():
            expected = model.encoder(inputs["input_ids"]).last_hidden_state[0]
        np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)
    assert len(found[1]) == 1 and len(found[4]) == 4


def test_qwen_vectors_are_the_states_after_the_final_norm(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    folder = tiny_chat.save_qwen_text(tmp_path / "qwen")
    found = create("text_encoder", "qwen2_5", checkpoint=folder, device="cpu").encode(TEXTS)
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, vectors in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer("<|endoftext|>" + text)["input_ids"]])
        with torch.inference_mode():
            answer = model(ids, output_hidden_states=True)
        np.testing.assert_allclose(vectors, answer.hidden_states[-1][0].numpy(), atol=1e-5)
        np.testing.assert_allclose(vectors @ model.lm_head.weight.detach().numpy().T, answer.logits[0].numpy(), atol=1e-3)
    assert len(found[1]) == 1


def test_a_batch_gives_what_single_texts_give(encoder: Callable[..., Any]) -> None:
    together, alone = encoder(batch_size=3).encode(TEXTS), encoder(batch_size=1)
    for text, vectors in zip(TEXTS, together, strict=True):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, alone.encode([text])[0], atol=1e-5)
    assert encoder().encode([]) == []


def test_long_texts_are_cut_to_max_tokens(encoder: Callable[..., Any]) -> None:
    long = "a red disc moves to the right, " * 40
    (whole,), (cut,) = encoder().encode([long]), encoder(max_tokens=7).encode([long])
    assert len(whole) == 256 and cut.shape == (7, encoder().dim)
    assert "max_tokens=7" in encoder(max_tokens=7).fingerprint
    with pytest.raises(ConfigError, match="max_tokens"):
        encoder(max_tokens=0)


@pytest.mark.parametrize("name", SAVERS)
def test_what_is_missing_is_named_with_its_remedy(name: str, check_missing: Callable) -> None:
    missing = create("text_encoder", name, device="cpu")
    check_missing(missing, lambda: missing.encode(["a disc"]))
    check_missing(missing, lambda: missing.dim)
