"""A pass whose answers come from a language model in a pool of its own (`ray.data.llm`, vLLM), in rounds.

    clips -> Asker (frames, the next question) -> vLLM -> Answerer (parse; done, or one more round) -> work folder
A backend with `engine: vllm` runs its own code, question after question, against `Replay`, which knows the answers of
earlier rounds and lets go of a clip at the first question that has none. So a backend says once what it asks, how it reads
an answer and when it asks again, whoever answers. Later rounds hold the few clips that need a second step or a repair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.passes import LaterPass, later_passes
from curation.scores_pass import ScoresPass, error_text
from curation.serial import Executor
from curation.stage import ClipMedia, Frames, Row, load_stages
from curation.tables import units_by_source
from curation.workfolder import WorkFolder
from waver_core.backends.pretrained._chat import Conversation, wire
from waver_core.config import Config, digest_of
from waver_core.errors import MediaError, UserError
from waver_core.isolation import isolated
from waver_core.manifest import rows_to_table
from waver_core.telemetry import StageTimer

MAX_ROUNDS = 4
"""Two steps (labels), each with one repair."""
TEXTS_PER_UNIT = 5000


class NotYet(Exception):
    """A question without an answer so far."""

    def __init__(self, conversation: Conversation, max_tokens: int, json_schema: Mapping[str, Any] | None) -> None:
        super().__init__("not answered")
        self.conversation, self.max_tokens, self.json_schema = conversation, max_tokens, json_schema


class Replay:
    """The chat engine of a backend while one clip is before it: hands out known answers in the order of the questions.

    An answer is a text, or {"error": text} where the model could not give one.
    """

    def __init__(self) -> None:
        self._answers: list[Any] = []
        self._next = 0

    def begin(self, answers: Sequence[Any]) -> None:
        """Take up a clip."""
        self._answers, self._next = list(answers), 0

    def complete(
        self, conversations: Sequence[Conversation], max_tokens: int, json_schema: Mapping[str, Any] | None = None
    ) -> list[str | Exception]:
        """See `ChatEngine`."""
        out: list[str | Exception] = []
        for conversation in conversations:
            if self._next >= len(self._answers):
                out.append(NotYet(conversation, max_tokens, json_schema))
                continue
            answer = self._answers[self._next]
            self._next += 1
            out.append(answer if isinstance(answer, str) else RuntimeError(answer["error"]))
        return out


class _Replayed:
    """What both halves share: the stage, its backend on `Replay`, and the shards it writes."""

    def __init__(self, config: Config, work: WorkFolder, name: str) -> None:
        self._work, self._max_attempts = work, config.funnel.max_attempts
        stages = load_stages(config)
        self.part = next(p for p in later_passes(config, stages) if p.name == name)
        self.clip_pass = ScoresPass(config, work, name) if self.part.hook == "clip" else None
        self.stage = self.clip_pass.stages[0] if self.clip_pass else self.part.members(stages)[0]
        self._schema = self.part.schema(stages)
        self.replay = Replay()
        self.stage.language_model.engine = self.replay

    def result(self, row: Row, frames: dict[Any, Frames], answers: Sequence[Any]) -> Row | Exception:
        """The stage's columns for one clip, or `NotYet`, or what went wrong."""
        self.replay.begin(answers)
        if self.part.hook == "text":
            return isolated(self.stage.annotate, [row])[0]
        return isolated(self.stage.score_many, [ClipMedia(dict(row), frames)])[0]

    def commit(self, results: Mapping[str, Row | Exception]) -> None:
        """Make results durable, errors as a text."""
        rows = [
            {"clip_id": k, **({f"{self.stage.name}_error": error_text(r)} if isinstance(r, Exception) else r)}
            for k, r in results.items()
        ]
        if rows:
            unit = digest_of(sorted(results))
            self._work.commit(self.part.name, unit, rows_to_table(rows, self._schema), {})


class Asker(_Replayed):
    """First half of a round: rows of the clip table in, questions out."""

    def __call__(self, clips: list[Row]) -> list[Row]:
        """Rows {clip_id, bytes, answers, context, messages, schema, max_tokens}; JSON in all but the first two and last."""
        out: list[Row] = []
        failed: dict[str, Row | Exception] = {}
        for row, frames in self._with_frames(clips, failed):
            answers = json.loads(row.pop("answers", None) or "[]")
            found = self.result(row, frames, answers)
            if isinstance(found, NotYet):
                times = [list(map(float, f.times_s)) for f in frames.values()]
                out.append(
                    {
                        "clip_id": row["clip_id"],
                        "bytes": row.get("bytes") or 0,
                        "answers": json.dumps(answers),
                        "context": json.dumps({"row": row, "times_s": times}),
                        "messages": json.dumps(wire(found.conversation)),
                        "schema": json.dumps(found.json_schema),
                        "max_tokens": found.max_tokens,
                    }
                )
            else:  # no question at all (a blank caption), or one that cannot be put
                failed[row["clip_id"]] = found
        self.commit(failed)
        return out

    def _with_frames(self, clips: list[Row], failed: dict[str, Row | Exception]) -> Iterator[tuple[Row, dict[Any, Frames]]]:
        if self.clip_pass is None:
            yield from ((row, {}) for row in clips)
            return
        for source_id, group in groupby(clips, key=itemgetter("source_id")):
            rows = {r["clip_id"]: r for r in group}
            attempt = self._work.begin_attempt(source_id)
            wrong: Exception = MediaError("no_frames", "no frame of the clip came in the decode for its caption")
            try:
                if attempt > self._max_attempts:
                    raise MediaError("crashes_worker", f"a worker died {attempt - 1} times on this file in one run")
                for media in self.clip_pass.media(list(rows.values()), StageTimer()):
                    del rows[media.row["clip_id"]]
                    yield media.row, media.frames
            except UserError:
                raise
            except Exception as error:
                wrong = error
            failed.update(dict.fromkeys(rows, wrong))
            self._work.end_attempts([source_id])


class Answerer(_Replayed):
    """Second half: questions with their answers in; what is done is committed, the rest comes back for another round."""

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Summaries {clip_id, bytes, reason, answers}; `answers` (JSON) is empty once a clip is done."""
        done: dict[str, Row | Exception] = {}
        out = []
        for row in rows:
            context = json.loads(row["context"])
            failed = row.get("__inference_error__") or ""
            answers = [*json.loads(row["answers"]), {"error": failed} if failed else row["generated_text"]]
            # Reading an answer takes the frames' times, not their pixels.
            requests = self.clip_pass.requests if self.clip_pass is not None else []
            frames = {
                r: Frames(np.zeros((len(t), 1, 1, 3), np.uint8), np.array(t))
                for r, t in zip(requests, context["times_s"], strict=True)
            }
            found = self.result(context["row"], frames, answers)
            again = isinstance(found, NotYet)
            if not again:
                done[row["clip_id"]] = found
            reason = error_text(found) if isinstance(found, Exception) and not again else ""
            known = json.dumps(answers) if again else ""
            out.append({"clip_id": row["clip_id"], "bytes": row["bytes"], "reason": reason, "answers": known})
        self.commit(done)
        return out


def converse(part: LaterPass, clips: pa.Table, config: Config, work: WorkFolder, execute: Executor) -> Iterator[Row]:
    """Run the rounds over the clips of a pass; yields a summary {bytes, reason} per clip that is done."""
    args, schema = (config, work, part.name), part.schema(load_stages(config))
    waiting = clips
    for number in range(MAX_ROUNDS):
        again: dict[str, str] = {}
        heard: set[str] = set()
        for row in execute.converse(Asker, Answerer, args, units_of_clips(waiting, part), part.resources):
            heard.add(row["clip_id"])
            if row["answers"]:
                again[row["clip_id"]] = row["answers"]
            else:
                yield row
        if number == 0 and len(heard) < len(clips):
            yield from _unasked(set(clips["clip_id"].to_pylist()) - heard, part, work, schema)
        if not again:
            return
        at = pc.index_in(clips["clip_id"], pa.array(list(again), pa.string())).combine_chunks()
        waiting = clips.append_column("answers", pa.array(list(again.values()), pa.string()).take(at)).filter(pc.is_valid(at))
    text = f"ValueError: no answer that could be used in {MAX_ROUNDS} rounds"
    rows = [{"clip_id": k, f"{part.stages[0]}_error": text} for k in again]
    work.commit(part.name, digest_of(sorted(again)), rows_to_table(rows, schema), {})
    yield from ({"bytes": 0, "reason": text} for _ in again)


def _unasked(ids: set[str], part: LaterPass, work: WorkFolder, schema: pa.Schema) -> Iterator[Row]:
    """Summaries of clips that the asker settled without a question: blank captions, and clips that could not be decoded."""
    results, _ = work.read(part.name, schema)
    for row in results.select(["clip_id", f"{part.stages[0]}_error"]).to_pylist():
        if row["clip_id"] in ids:
            ids.discard(row["clip_id"])
            yield {"bytes": 0, "reason": row[f"{part.stages[0]}_error"] or ""}


def units_of_clips(clips: pa.Table, part: LaterPass) -> list[pa.Table]:
    """Units of a pass: whole sources where frames are needed, else slices."""
    if part.hook == "clip":
        return units_by_source(clips, part.resources.sources_per_task)
    return [clips.slice(start, TEXTS_PER_UNIT) for start in range(0, len(clips), TEXTS_PER_UNIT)]
