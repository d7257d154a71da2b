"""Which facts of a prompt a measured video shows: the judge of the closed loop (design §6)."""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

from waver_core.captions.facts import ObjectFacts, SceneFacts

_MAX_OBJECTS = 5


class Agreement(NamedTuple):
    """One fact that a prompt asks for, what was measured (None: not stated), and whether they agree."""

    fact: str
    wanted: str
    measured: str | None
    agrees: bool


def compare(prompt: SceneFacts, measured: SceneFacts) -> list[Agreement]:
    """One entry per fact of the prompt; facts that the prompt leaves open are not judged.

    Objects are paired so that most facts agree. Facts are named `background`, `light`, `camera`, `text`, `objects` (how many)
    and `colour`, `shape`, `size`, `position`, `direction` and `speed`, of objects after the first with a number: `colour_2`.
    """
    found = []
    if prompt.background:
        shared = bool(set(prompt.background) & set(measured.background))
        found.append(Agreement("background", ", ".join(prompt.background), _list(measured.background), shared))
    for name in ("light", "camera"):
        if (wanted := getattr(prompt, name)) is not None:
            found.append(_agreement(name, wanted, getattr(measured, name)))
    for text in prompt.texts:
        hit = next((t for t in measured.texts if t.casefold() == text.casefold()), None)
        found.append(Agreement("text", text, hit if hit is not None else _list(measured.texts), hit is not None))
    if prompt.objects:
        counts = len(prompt.objects), len(measured.objects)
        found.append(Agreement("objects", str(counts[0]), str(counts[1]), counts[0] == counts[1]))
        found += _paired(prompt.objects, measured.objects)
    return found


def share_agreeing(agreements: list[Agreement]) -> float | None:
    """Share of a prompt's facts that a video shows; None for a prompt that states none."""
    return sum(a.agrees for a in agreements) / len(agreements) if agreements else None


def _paired(wanted: tuple[ObjectFacts, ...], seen: tuple[ObjectFacts, ...]) -> list[Agreement]:
    """Judgements under the pairing of objects that agrees best; an object without partner agrees in nothing."""
    wanted = wanted[:_MAX_OBJECTS]
    pool = [*seen[:_MAX_OBJECTS], *[ObjectFacts()] * max(0, len(wanted) - len(seen))]
    best: list[Agreement] = []
    for order in permutations(pool, len(wanted)):
        judged = [a for number, (w, s) in enumerate(zip(wanted, order, strict=True)) for a in _judge(w, s, number)]
        if not best or sum(a.agrees for a in judged) > sum(a.agrees for a in best):
            best = judged
    return best


def _judge(wanted: ObjectFacts, seen: ObjectFacts, number: int) -> list[Agreement]:
    suffix = f"_{number + 1}" if number else ""
    found = []
    for name in ("colour", "shape", "size", "position"):
        if (value := getattr(wanted, name)) is not None:
            found.append(_agreement(name + suffix, value, getattr(seen, name)))
    if wanted.motion is not None:
        found.append(_agreement("direction" + suffix, wanted.motion, seen.motion))
    words = {p.speed_word for p in wanted.phases} - {None}
    if len(words) == 1:
        measured = {p.speed_word for p in seen.phases if p.motion != "rest"} - {None}
        found.append(_agreement("speed" + suffix, str(words.pop()), str(measured.pop()) if len(measured) == 1 else None))
    return found


def _agreement(fact: str, wanted: str, measured: str | None) -> Agreement:
    return Agreement(fact, wanted, measured, wanted == measured)


def _list(values: tuple[str, ...]) -> str | None:
    return ", ".join(values) or None
