"""Tiny randomly initialised checkpoints of the true architectures, with tokenizers and processors, as the hub lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from waver_core.backends.contracts import ClipView

QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SMOL_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    "<video>",
]
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Time 0.5s: Statement: Answer with one word, Yes or No.",
    "yes no Yes No YES NO the a of and clip video picture frame user assistant system",
]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}VIDEO{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(specials: list[str], template: str, eos: str) -> Any:
    """A byte-level BPE tokenizer as Qwen and SmolLM have, in which yes and no are whole tokens, as they are there."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = _CORPUS * 8 + [f"{space}{word}" for word in ("yes", "Yes", "YES", "no", "No", "NO") for space in ("", " ")] * 50
    core.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=340, special_tokens=specials, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>", model_max_length=32768)
    fast.add_special_tokens({"additional_special_tokens": specials})
    fast.chat_template = template
    return fast


def text_config(vocabulary: int, **more: Any) -> dict[str, Any]:
    """Two layers, grouped queries, 32 wide."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "initializer_range": 0.3,  # so that answers differ from clip to clip
        **more,
    }


def save_qwen_text(folder: Path) -> str:
    """Qwen2.5 (Qwen2ForCausalLM)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = tokenizer(QWEN_SPECIALS, QWEN_TEMPLATE, "<|im_end|>")
    Qwen2ForCausalLM(Qwen2Config(**text_config(len(words)))).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def save_qwen_vl(folder: Path) -> str:
    """Qwen2.5-VL."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    words = tokenizer(QWEN_SPECIALS, QWEN_TEMPLATE, "<|im_end|>")
    ids = {name: words.convert_tokens_to_ids(f"<|{token}|>") for name, token in _QWEN_IDS.items()}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=text_config(len(words), rope_parameters=rope),
        vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 56},
        **ids,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size), words, Qwen2VLVideoProcessor(size=size), chat_template=QWEN_TEMPLATE
    ).save_pretrained(folder)
    return str(folder)


_QWEN_IDS = {
    "image_token_id": "image_pad",
    "video_token_id": "video_pad",
    "vision_start_token_id": "vision_start",
    "vision_end_token_id": "vision_end",
}


def save_videollama3(folder: Path) -> str:
    """VideoLLaMA3, with the frame compression of the published processor."""
    from transformers import (
        VideoLlama3Config,
        VideoLlama3ForConditionalGeneration,
        VideoLlama3ImageProcessor,
        VideoLlama3Processor,
        VideoLlama3VideoProcessor,
    )

    template = QWEN_TEMPLATE.replace("VIDEO", "<|video_pad|>\n")
    words = tokenizer(QWEN_SPECIALS, template, "<|im_end|>")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    config = VideoLlama3Config(
        text_config={"model_type": "qwen2", **text_config(len(words))},
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
    )
    VideoLlama3ForConditionalGeneration(config).save_pretrained(folder)
    video = VideoLlama3VideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 6 * 84 * 84}, use_token_compression=True)
    VideoLlama3Processor(VideoLlama3ImageProcessor(), words, video, chat_template=template).save_pretrained(folder)
    return str(folder)


def save_smolvlm(folder: Path) -> str:
    """SmolVLM2: SigLIP-like tower of 32 px, 4 tokens a frame."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    words = tokenizer(SMOL_SPECIALS, SMOL_TEMPLATE, "<end_of_utterance>")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **text_config(len(words), pad_token_id=0)},
        vision_config={**vision, "patch_size": 8, "image_size": 32, "initializer_range": 0.3},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    edge = {"longest_edge": 32}
    SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size=edge, do_image_splitting=True),
        words,
        SmolVLMVideoProcessor(size={"longest_edge": 64}, max_image_size=edge, num_frames=64, fps=1),
        image_seq_len=4,
        chat_template=SMOL_TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def clip(seed: int, frames: int = 4, start_s: float = 10.0, **row: Any) -> ClipView:
    """A clip of random frames of 56x84 at 2 fps, that starts `start_s` into its source."""
    rgb = np.random.default_rng(seed).integers(0, 256, (frames, 56, 84, 3)).astype(np.uint8)
    span = {"kind": "video", "start_s": start_s, "end_s": start_s + frames / 2}
    return ClipView(rgb, start_s + np.arange(frames) / 2, {**span, **row})
