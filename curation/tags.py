"""Prompt tagging (Waver §4.5): the style in front of the training caption, words for its quality behind it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.gates import check_gate, pass_mask
from waver_core.config import QualityTag, Tags


def check_tags(tags: Tags, schema: pa.Schema) -> None:
    """Raises `ConfigError` for a tag on a column that no stage writes or on one of the wrong type."""
    for name, tag in tags.quality.items():
        check_gate(f"tags.quality.{name}", tag, schema)


def add_training_captions(clips: pa.Table, tags: Tags) -> pa.Table:
    """Fill `training_caption`: "<style>. <caption> <quality words>."; null where there is no caption.

    The style is the input list's, or else the captioner's. A style without words and a condition that is not met add none.
    """
    if "caption" not in clips.column_names:
        return clips
    style = pc.coalesce(clips["style"], clips["caption_style"])
    names = pa.array(list(tags.style), pa.string())
    sentences = pa.array([f"{_sentence(words)} " for words in tags.style.values()], pa.string())
    before = pc.fill_null(sentences.take(pc.index_in(style, names).combine_chunks()), "")
    met = [pc.if_else(pa.array(_meets(tag, clips)), f", {tag.words}", "") for tag in tags.quality.values()]
    words = pc.binary_join_element_wise(*met, "") if met else pa.array([""] * len(clips), pa.string())
    first = pc.utf8_upper(pc.utf8_slice_codeunits(words, 2, 3))  # the comma in front is left out, the rest as it was written
    sentence = pc.binary_join_element_wise(first, pc.utf8_slice_codeunits(words, 3), "")
    after = pc.if_else(pc.equal(words, ""), "", pc.binary_join_element_wise(" ", sentence, ".", ""))
    joined = pc.binary_join_element_wise(before, clips["caption"], after, "")
    index = clips.schema.get_field_index("training_caption")
    return clips.set_column(index, clips.schema.field(index), pc.if_else(pc.is_valid(clips["caption"]), joined, None))


def _meets(tag: QualityTag, clips: pa.Table) -> np.ndarray:
    """Rows that meet a tag's condition; unlike at a gate, rows it is not for do not."""
    mask = pass_mask(tag, clips)
    for column, value in tag.condition.items():
        mask = mask & np.asarray(pc.fill_null(pc.equal(clips[column], value), False))
    return mask


def _sentence(words: str) -> str:
    return words if words.endswith((".", "!", "?")) else f"{words}."
