"""Tiny randomly initialised checkpoints of the encoders that training needs, as the hub lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

T5_WORDS = ("a", "red", "blue", "disc", "ring", "moves", "left", "right", "to", "the", "of")


def save_wan_vae(folder: Path, **changes: Any) -> str:
    """Wan 2.1's autoencoder, 8 wide instead of 96, with the published statistics, in the folder `vae` of a pipeline."""
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(**{"base_dim": 8, "num_res_blocks": 1, **changes}).save_pretrained(folder / "vae")
    return str(folder)


def save_t5(folder: Path) -> str:
    """flan-t5: T5 v1.1's gated feed-forward, a unigram tokenizer that ends texts with `</s>`, weights of both halves."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in T5_WORDS), *"abcdefghijklmnopqrstuvwxyz.,"]
    core = Tokenizer(models.Unigram([(piece, -float(k)) for k, piece in enumerate(pieces)], unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    config = T5Config(
        vocab_size=len(pieces),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        initializer_factor=1.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
