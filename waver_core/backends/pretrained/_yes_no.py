"""Quality judge that asks a video-language model yes-or-no questions and reads the probabilities of the answer's token.

For each question, p = P(yes) / (P(yes) + P(no)) at the place where the answer begins. A word counts in all the spellings
that are one token of the checkpoint: Yes, yes, YES, each with and without a space before it; No likewise. Their
probabilities are added up, since which spelling follows is a matter of the chat template.

The questions of a clip begin alike: video first, the statement last. What they share is computed once, with vision tower
and all, and each question goes on from a copy of its keys and values. The result equals a whole forward pass per question.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from waver_core.backends.contracts import ISSUES, ClipView, Quality
from waver_core.backends.pretrained._chat import filled
from waver_core.backends.pretrained._frames import Sampled, sample
from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import BackendUnavailable, ConfigError
from waver_core.isolation import isolated
from waver_core.prompts import Prompt, load_prompt

HIGH_QUALITY = "high_quality"
_TICKS_PER_S = 1000
"""Times are given to processors as frame numbers at this rate, which lets them be any."""


class YesNoJudge(Pretrained):
    """Base of judges by answer token.

    frames: how many, spread evenly over the clip. short_side_px: what they are shrunk to before the checkpoint's own
    processor. prompt: the question, with the placeholder `$statement`; statements: a line `name: sentence` for every issue
    and for high_quality. batch_size counts clips.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers")
    known: ClassVar[tuple[Checkpoint, ...]] = ()
    name: ClassVar[str] = ""

    def __init__(
        self,
        *,
        checkpoint: str,
        frames: int,
        revision: str | None = None,
        short_side_px: int = 448,
        prompt: str = "quality_judge.v1",
        statements: str = "quality_statements.v1",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 4,
    ) -> None:
        super().__init__(device=device, dtype=dtype, batch_size=batch_size)
        if frames < 1 or short_side_px < 1:
            raise ConfigError(f"{self.name}: frames and short_side_px must be at least 1")
        self.checkpoint = known_or(checkpoint, self.known, revision)
        self._frames, self._short_side_px = frames, short_side_px
        question, table = load_prompt(prompt), load_prompt(statements)
        self.questions = _questions(question, table)
        prompts = ",".join(f"{p.name}:{p.digest}" for p in (question, table))
        self.fingerprint = self.identity(f"{self.name}-1", prompts=prompts, frames=f"{frames},{short_side_px}px")

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The one that answers."""
        return (self.checkpoint,)

    def judge(self, clips: Sequence[ClipView]) -> list[Quality | Exception]:
        """See `QualityJudge`."""
        self._model  # noqa: B018  (a checkpoint that cannot be loaded is no fault of a clip)
        results: list[Quality | Exception] = [ValueError("not judged")] * len(clips)
        # Clips of unlike length are not put together: some processors write the longest one's frame count into every prompt.
        alike: dict[int, list[tuple[int, Sampled]]] = defaultdict(list)
        for k, clip in enumerate(clips):
            try:
                seen = sample(clip, self._frames, short_side_px=self._short_side_px)
            except ValueError as error:
                results[k] = error.with_traceback(None)  # whose frames would keep the pictures
                continue
            alike[len(seen.rgb)].append((k, seen))
        for group in alike.values():
            for part in self.batches(len(group)):
                verdicts = isolated(self._judge, [seen for _, seen in group[part]])
                for (k, _), verdict in zip(group[part], verdicts, strict=True):
                    results[k] = verdict
        return results

    def _judge(self, clips: Sequence[Sampled]) -> list[Quality]:
        rows = [[float(p) for p in row] for row in self.probabilities(clips)]
        return [Quality(dict(zip(ISSUES, row, strict=False)), row[-1]) for row in rows]

    def probabilities(self, clips: Sequence[Sampled]) -> np.ndarray:
        """float32 [B, Q]: the probability of yes for each of the B clips and Q questions (`ISSUES`, then high quality)."""
        torch = self.module("torch")
        inputs, endings = self._inputs(clips)
        model, columns = self._model, []
        with torch.inference_mode():
            start = model.base_model(**inputs, use_cache=True)
            mask = inputs["attention_mask"]
            lengths = mask.sum(dim=1, keepdim=True)
            for ending in endings:
                tokens = torch.tensor(ending, device=self.device).expand(len(clips), -1)
                state = model.base_model(
                    input_ids=tokens,
                    attention_mask=torch.cat([mask, torch.ones_like(tokens)], dim=1),
                    position_ids=lengths + torch.arange(len(ending), device=self.device),
                    past_key_values=self._forked(start.past_key_values),
                    use_cache=True,
                ).last_hidden_state[:, -1]
                logits = model.get_output_embeddings()(state).float()
                yes, no = (logits[:, ids].logsumexp(dim=1) for ids in self._answers)
                columns.append(torch.sigmoid(yes - no))
        probabilities: np.ndarray = torch.stack(columns, dim=1).cpu().numpy()
        return probabilities

    def _inputs(self, clips: Sequence[Sampled]) -> tuple[dict[str, Any], list[list[int]]]:
        """Model inputs of what the questions share (left-padded, position_ids set), and the rest of each as token ids.

        The processor writes out the video once, in the first question; the others are that text with another end. All are
        tokenised whole, and only then is the common beginning cut off, so that no token differs from asking one by one.
        """
        torch, tokenizer = self.module("torch"), self._processor.tokenizer
        prompts = [
            self._processor.apply_chat_template(_message(q), add_generation_prompt=True, tokenize=False) for q in self.questions
        ]
        shared = len(_common([list(p) for p in prompts]))
        written = self._processor(
            text=[prompts[0]] * len(clips),
            videos=[clip.rgb for clip in clips],
            video_metadata=[_metadata(clip) for clip in clips],
            do_sample_frames=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,
        ).to(self.device)
        heads, endings = [], []
        for ids, mask in zip(written.pop("input_ids").tolist(), written.pop("attention_mask").tolist(), strict=True):
            ids = [token for token, real in zip(ids, mask, strict=True) if real]
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            head = text[: len(text) - len(prompts[0]) + shared]
            whole = [tokenizer(head + p[shared:], add_special_tokens=False)["input_ids"] for p in prompts]
            if whole[0] != ids:
                raise RuntimeError(f"the tokenizer of {self.checkpoint.repo} does not give back its own text")
            heads.append(_common(whole))
            endings.append([tokens[len(heads[-1]) :] for tokens in whole])
        if any(other != endings[0] for other in endings):
            raise RuntimeError(f"the tokenizer of {self.checkpoint.repo} ends the same question in different tokens")
        longest = max(map(len, heads))
        pad = tokenizer.pad_token_id or 0
        ids_BN = torch.tensor([[pad] * (longest - len(h)) + h for h in heads], device=self.device)
        mask_BN = torch.tensor([[0] * (longest - len(h)) + [1] * len(h) for h in heads], device=self.device)
        positions_BN = (mask_BN.cumsum(dim=1) - 1).clamp(min=0)
        media = {name: value for name, value in written.items() if hasattr(value, "shape") and name not in ("token_type_ids",)}
        return {"input_ids": ids_BN, "attention_mask": mask_BN, "position_ids": positions_BN, **media}, endings[0]

    @staticmethod
    def _forked(cache: Any) -> Any:
        """A cache that goes on from `cache` and leaves it as it is: growing makes new tensors."""
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        return fork

    @cached_property
    def _processor(self) -> Any:
        return self.module("transformers").AutoProcessor.from_pretrained(self.checkpoint.locate(), local_files_only=True)

    @cached_property
    def _model(self) -> Any:
        self.require()
        folder = self.checkpoint.locate()
        kind = self.module("transformers").AutoModelForImageTextToText
        return kind.from_pretrained(folder, dtype=self.dtype, local_files_only=True).to(self.device).eval()

    @cached_property
    def _answers(self) -> tuple[list[int], list[int]]:
        """Token ids that mean yes, and those that mean no."""
        yes, no = (_spellings(self._processor.tokenizer, word) for word in ("yes", "no"))
        if not yes or not no:
            raise BackendUnavailable(f"{self.checkpoint.repo} has no tokens for yes and no: its answers cannot be read")
        return yes, no


def _questions(question: Prompt, table: Prompt) -> list[str]:
    """The question for every issue and, last, for high quality."""
    pairs = (line.split(":", 1) for line in table.text.splitlines() if line.strip() and not line.startswith("#"))
    sentences = {pair[0].strip(): pair[-1].strip() for pair in pairs}
    wrong = sorted({*ISSUES, HIGH_QUALITY} ^ {key for key, sentence in sentences.items() if sentence})
    if wrong:
        raise ConfigError(f"{table.name} must hold one sentence for each issue and for {HIGH_QUALITY}: see {', '.join(wrong)}")
    questions = [filled(question, statement=sentences[key]) for key in (*ISSUES, HIGH_QUALITY)]
    if len(set(questions)) < len(questions):
        raise ConfigError(f"{question.name} asks the same twice: it needs $statement, and {table.name} a sentence for each")
    return questions


def _message(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def _metadata(clip: Sampled) -> dict[str, Any]:
    ticks = [round(float(t) * _TICKS_PER_S) for t in clip.times_s]
    total = max(round(clip.duration_s * _TICKS_PER_S), ticks[-1] + 1)
    return {"total_num_frames": total, "fps": _TICKS_PER_S, "duration": clip.duration_s, "frames_indices": ticks}


def _common(sequences: Sequence[list[Any]]) -> list[Any]:
    """The longest beginning that all share, short of the whole of any: each keeps at least one element of its own."""
    length = min(map(len, sequences)) - 1
    for k in range(length):
        if len({s[k] for s in sequences}) > 1:
            return sequences[0][:k]
    return sequences[0][:length]


def _spellings(tokenizer: Any, word: str) -> list[int]:
    texts = [space + spelling for spelling in (word, word.capitalize(), word.upper()) for space in ("", " ")]
    coded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return sorted({ids[0] for ids in coded if len(ids) == 1})
