"""Action labels from captions with Qwen2.5 (Waver §3.4: Qwen2.5-32B), in two steps down the taxonomy.

The first question shows the 12 first-level and 100 second-level names, the second one only the labels (about 70) within
the class that was chosen. Names stand before the caption in the prompt, so that engines that cache prefixes read them once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from waver_core.backends.contracts import NO_ACTION, ActionLabel
from waver_core.backends.pretrained._chat import Conversation, ask, filled, json_object, object_schema, text_field
from waver_core.backends.pretrained._chat_backend import ChatBackend
from waver_core.checkpoints import Checkpoint
from waver_core.prompts import load_prompt
from waver_core.registry import register
from waver_core.taxonomy import Taxonomy, load_taxonomy

NONE = "none"
NEAR = 0.85
"""Share of letters (difflib's ratio) from which a name that is not in the taxonomy counts as a slip of the pen..."""
AHEAD = 0.05
"""...if no other name comes within this of it."""


@register("action_labeler", "qwen2_5")
class Qwen25Labeler(ChatBackend):
    """Qwen2.5-Instruct, 32B by default. Options: the two prompts, `taxonomy_path` (YAML of three levels; the project's own
    by default), and those of `ChatBackend`.

    Pure parts for engines run elsewhere: `messages(caption)`, `json_schema` and `parse(text, caption)` for the first step;
    then, where `wants_level3`, the same with `within=` the label so far (`schema(within)`).
    """

    name = "qwen2_5"
    reads_images = False
    known = (
        Checkpoint("Qwen/Qwen2.5-0.5B-Instruct", 1_000, "Apache-2.0"),
        Checkpoint("Qwen/Qwen2.5-7B-Instruct", 15_243, "Apache-2.0"),
        Checkpoint("Qwen/Qwen2.5-14B-Instruct", 29_552, "Apache-2.0"),
        Checkpoint("Qwen/Qwen2.5-32B-Instruct", 65_540, "Apache-2.0"),
    )

    def __init__(
        self,
        *,
        checkpoint: str = "Qwen/Qwen2.5-32B-Instruct",
        prompt_level2: str = "action_level2.v1",
        prompt_level3: str = "action_level3.v1",
        taxonomy_path: str | None = None,
        max_tokens: int = 96,
        batch_size: int = 16,
        **chat: Any,
    ) -> None:
        super().__init__(checkpoint=checkpoint, max_tokens=max_tokens, batch_size=batch_size, **chat)
        self._prompts = load_prompt(prompt_level2), load_prompt(prompt_level3)
        self.taxonomy: Taxonomy = load_taxonomy(taxonomy_path)
        self.fingerprint = self.chat_identity(*self._prompts, taxonomy=self.taxonomy.digest)

    @property
    def json_schema(self) -> Mapping[str, Any]:
        """Schema of the first step's answer."""
        return self.schema()

    def schema(self, within: ActionLabel | None = None) -> Mapping[str, Any]:
        """Schema of an answer. The second step's does not list the labels, so that one serves captions of every class."""
        if within is not None:
            return object_schema(level3={"type": "string"})
        return object_schema(
            level1={"type": "string", "enum": [*self.taxonomy.tree, NONE]},
            level2={"type": "string", "enum": [*self._parents, NONE]},
        )

    def messages(self, caption: str, within: ActionLabel | None = None) -> Conversation:
        """What the model is asked: the first two levels, or the third one within a label so far."""
        if within is None:
            classes = "\n".join(f"{one}: {'; '.join(below)}" for one, below in self.taxonomy.tree.items())
            text = filled(self._prompts[0], classes=classes, caption=caption)
        else:
            labels = "\n".join(self.taxonomy.tree[within.level1][within.level2])
            text = filled(self._prompts[1], level1=within.level1, level2=within.level2, labels=labels, caption=caption)
        return [{"role": "user", "content": text}]

    def parse(self, text: str, caption: str, within: ActionLabel | None = None) -> ActionLabel:
        """The label so far (level 3 still "none"), or the whole label; `ValueError` names what is not in the taxonomy.

        Level 2 decides: where it stands below another first level than the one answered, its own is taken.
        """
        value = json_object(text)
        if within is not None:
            labels = self.taxonomy.tree[within.level1][within.level2]
            return within._replace(level3=_name(text_field(value, "level3"), labels, "level3"))
        level2 = _name(text_field(value, "level2"), self._parents, "level2")
        if level2 != NONE:
            return ActionLabel(self._parents[level2], level2, NONE)
        return ActionLabel(_name(text_field(value, "level1"), self.taxonomy.tree, "level1"), NONE, NONE)

    @staticmethod
    def wants_level3(label: ActionLabel) -> bool:
        """Whether the second step is to be asked."""
        return label.level2 != NONE

    def label(self, captions: Sequence[str]) -> list[ActionLabel | Exception]:
        """See `ActionLabeler`. A blank caption has no action."""
        results: list[ActionLabel | Exception] = [NO_ACTION] * len(captions)
        for within in (False, True):
            places = [k for k, caption in enumerate(captions) if caption.strip() and self._open(results[k], within)]
            so_far = {k: label for k in places if within and isinstance(label := results[k], ActionLabel)}
            answers = self._step([captions[k] for k in places], [so_far.get(k) for k in places])
            for k, answer in zip(places, answers, strict=True):
                results[k] = answer
        return results

    def _open(self, result: ActionLabel | Exception, within: bool) -> bool:
        return not within or (isinstance(result, ActionLabel) and self.wants_level3(result))

    def _step(self, captions: Sequence[str], so_far: Sequence[ActionLabel | None]) -> list[ActionLabel | Exception]:
        if not captions:
            return []
        conversations = [self.messages(caption, within) for caption, within in zip(captions, so_far, strict=True)]
        return ask(
            self.engine,
            conversations,
            lambda k, text: self.parse(text, captions[k], so_far[k]),
            self.max_tokens,
            self.schema(so_far[0]),
        )

    @cached_property
    def _parents(self) -> dict[str, str]:
        """First level of every second-level class; their names are unique."""
        return {two: one for one, below in self.taxonomy.tree.items() for two in below}


def _plain(name: str) -> str:
    """Letters and digits only, in lower case, "&" written out: what two spellings of one name share."""
    return " ".join(re.findall(r"[^\W_]+", name.lower().replace("&", " and ")))


def _name(answer: str, names: Iterable[str], key: str) -> str:
    """The name that an answer means: the same letters, or the one name that is nearly the same (see `NEAR`, `AHEAD`)."""
    plain = {_plain(name): name for name in (*names, NONE)}
    asked = _plain(answer)
    if asked in plain:
        return plain[asked]
    ranked = sorted(((difflib.SequenceMatcher(None, asked, p).ratio(), name) for p, name in plain.items()), reverse=True)
    if ranked[0][0] >= NEAR and (len(ranked) == 1 or ranked[0][0] - ranked[1][0] >= AHEAD):
        return ranked[0][1]
    raise ValueError(f"'{answer}' is not one of the names given for '{key}'; the nearest is '{ranked[0][1]}'")
