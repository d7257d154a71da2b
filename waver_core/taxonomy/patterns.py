"""What the labels of the taxonomy ask of a sentence, indexed by verb and rarest word (Waver §3.4)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from waver_core.backends.contracts import ActionLabel
from waver_core.taxonomy import Taxonomy
from waver_core.taxonomy.grammar import TOKEN, Words, guessed_verb, lemma_of, load_words, noun_forms, verb_forms

_NEARLY = 0.7
"""A verb stands for a class without further words when at least this share of its labels belongs to the class,"""
_ENOUGH = 3
"""and at least so many."""


class Pattern(NamedTuple):
    """What a label asks of a sentence beside its verb."""

    order: int
    path: ActionLabel
    subject: str
    """What does it, for labels of animals and things; "" for people."""
    object: str
    modifiers: tuple[str, ...]
    """Words that stand before the object, or before the subject where there is no object: "soccer" of a ball."""
    particles: tuple[str, ...]
    rest: tuple[str, ...]
    keys: frozenset[str]
    """All of the five above."""
    rank: int
    """Higher is preferred: a bare verb 3, and 4 more a word; what goes on beside an action, and labels met in part, less."""
    posture: bool
    """Whether the verb is one of a state, such as "stand": people and animals only."""
    same: bool = False
    """Whether it stands here under another verb than its own ("hurl" for "throw")."""


class Group(NamedTuple):
    """The patterns of one verb: those that ask for nothing else, the others under their rarest word; and for captions
    that match no label wholly, one label for the verb with its object or subject alone, and one for the bare verb."""

    alone: list[Pattern]
    by_key: dict[str, list[Pattern]]
    loose: dict[str, list[Pattern]]
    bare: list[Pattern]


class Entry(NamedTuple):
    """What a word of a caption may be: keys, its own first, and forms of verbs with their tags."""

    keys: tuple[str, ...]
    verbs: tuple[tuple[str, frozenset[str]], ...]
    own: int
    """How many of the keys are the word itself and not a kind of it."""


def build_index(labels: Taxonomy) -> tuple[dict[str, Group], dict[str, Entry]]:
    """Patterns by verb, and the words of captions that matter to them; nothing changes them afterwards."""
    lists = load_words()
    things = {name for name, classes in labels.tree.items() if _of_things(label for found in classes.values() for label in found)}
    parsed = [found for order, path in enumerate(labels) if (found := _parse(order, path, lists, path.level1 in things))]
    counts = Counter(key for _, pattern in parsed for key in pattern.keys)
    groups: dict[str, Group] = {}
    for verb, pattern in parsed:
        for lemma in (verb, *lists.same.get(verb, ())):
            group = groups.setdefault(lemma, Group([], {}, {}, []))
            entry = pattern if lemma == verb else pattern._replace(same=True)
            if pattern.keys:
                rarest = min(pattern.keys, key=lambda key: (counts[key], key))
                group.by_key.setdefault(rarest, []).append(entry)
            elif lemma == verb:
                group.alone.append(entry)
    _add_loose(groups, parsed)
    return groups, _entries(groups, counts, lists)


def _add_loose(groups: dict[str, Group], parsed: Iterable[tuple[str, Pattern]]) -> None:
    """For each verb and main word the label with fewest other words, of the class that has most such labels."""
    by_pair: dict[tuple[str, str, str], list[Pattern]] = {}
    for verb, pattern in parsed:
        if not pattern.subject:
            by_pair.setdefault((verb, "", ""), []).append(pattern)
        if pattern.subject and pattern.object:
            by_pair.setdefault((verb, pattern.subject, pattern.subject), []).append(pattern)
        if main := pattern.object or pattern.subject or "".join(pattern.rest[:1]):
            by_pair.setdefault((verb, pattern.subject, main), []).append(pattern)
    for (verb, subject, main), patterns in by_pair.items():
        if main and len({pattern.modifiers for pattern in patterns}) == 1 and patterns[0].modifiers:
            continue  # "driving a ping pong ball" alone says nothing of other balls
        (top, count), *others = Counter(pattern.path.level2 for pattern in patterns).most_common(2)
        if others and others[0][1] == count:
            continue
        least = min((p for p in patterns if p.path.level2 == top), key=lambda p: (len(p.keys), p.order))
        needed = tuple(key for key in dict.fromkeys((subject, main)) if key)
        if main and len(least.keys) > len(needed):
            thing = main if main == least.object else ""
            rest = () if main in (thing, subject) else (main,)
            rank = 1 if least.posture else 4 * len(needed)
            kept = least._replace(object=thing, modifiers=(), particles=(), rest=rest, keys=frozenset(needed), rank=rank)
            groups[verb].loose.setdefault(main, []).append(kept)
        elif not main and count >= max(_ENOUGH, _NEARLY * len(patterns)) and least.keys:
            bare = least._replace(
                object="", modifiers=(), particles=(), rest=(), keys=frozenset(), rank=0 if least.posture else 1
            )
            groups[verb].bare.append(bare)


def _entries(groups: dict[str, Group], counts: Iterable[str], lists: Words) -> dict[str, Entry]:
    known = set(counts)
    own: dict[str, dict[str, None]] = {}
    for key in counts:
        for form in _forms_of_key(key, lists):
            own.setdefault(form, {})[key] = None
    verbs: dict[str, dict[str, frozenset[str]]] = {}
    for lemma in groups:
        for spelled in (lemma, *lists.spelling.get(lemma, ())):
            for form, tags in verb_forms(spelled).items():
                british = re.sub("iz(e|es|ed|ing)$", r"is\1", form)
                for variant in (form, british, form.replace("-", "")):
                    verbs.setdefault(variant, {})[lemma] = tags
    entries = {}
    for form in own.keys() | verbs.keys() | lists.kinds.keys():
        keys = own.get(form, {})
        kinds = dict.fromkeys(kind for kind in lists.kinds.get(form, ()) if kind in known and kind not in keys)
        if keys or kinds or form in verbs:
            entries[form] = Entry((*keys, *kinds), tuple(verbs.get(form, {}).items()), len(keys))
    return entries


def _forms_of_key(key: str, lists: Words) -> Iterable[str]:
    """All forms of a content word: plurals, those of the verb it may be, British spellings, hyphens left out."""
    forms: list[str] = []
    for spelled in (key, *lists.spelling.get(key, ())):
        forms += noun_forms(spelled)
        if lemma_of(spelled, "VERB") == spelled:
            forms += verb_forms(spelled)
    forms += [form.replace("-", "") for form in forms]
    return dict.fromkeys(forms)


def _key(word: str) -> str:
    """What stands for all forms of a content word: a gerund's verb, else the singular."""
    if word.endswith("ing") and (verb := lemma_of(word, "VERB")):
        return verb
    return lemma_of(word, "NOUN") or lemma_of(word, "VERB") or word


def _gerunds(words: Sequence[str]) -> list[int]:
    return [k for k, word in enumerate(words) if word.endswith("ing") and lemma_of(word, "VERB") not in (None, word)]


def _of_things(labels: Iterable[str]) -> bool:
    """Whether most labels begin with a subject: a gerund that comes first is then part of its name ("sewing machine")."""
    first = [_gerunds(label.split()[:1]) for label in labels]
    return 2 * sum(map(len, first)) < len(first)


def _parse(order: int, path: ActionLabel, lists: Words, of_things: bool) -> tuple[str, Pattern] | None:
    """The verb of a label and what it asks for beside it; None for a label without a gerund."""
    words = TOKEN.findall(path.level3.lower())
    gerunds = _gerunds(words)
    if not of_things and words[0].endswith("ing") and 0 not in gerunds:
        gerunds = [0, *gerunds]  # "skydiving", which the dictionary has as a noun only
    if not gerunds:
        return None
    first = gerunds[1] if of_things and gerunds[0] == 0 and len(gerunds) > 1 else gerunds[0]
    verb = lemma_of(words[first], "VERB") or guessed_verb(words[first])
    before = [_key(word) for word in words[:first] if word not in lists.fillers]
    after = words[first + 1 :]
    passive = words[first] == "being" and bool(after)
    if passive:
        verb, after = lemma_of(after[0], "VERB") or after[0], after[1:]
    ends = [
        word in lists.joining or (word in lists.either and [*after, "of"][k + 1] not in lists.joining)
        for k, word in enumerate(after)
    ]
    direct = ends.index(True) if True in ends else len(after)
    particles = tuple(word for word, preposition in zip(after, ends) if word in lists.particles and not preposition)
    objects = [_key(word) for word in after[:direct] if word not in lists.fillers and word not in lists.particles]
    rest = tuple(_key(word) for word in after[direct:] if word not in lists.fillers and word not in lists.particles)
    subject, thing = (before or [""])[-1], (objects or [""])[-1]
    modifiers = (*objects[:-1], *before[:-1]) if thing or not objects else ()
    if passive:
        subject, thing = "", subject
    keys = frozenset({subject, thing, *modifiers, *particles, *rest} - {""})
    if not keys and len(words) > 1:
        return None  # "playing one on one": nothing to tell it by
    posture = verb in lists.light
    rank = (2 if keys else 0) if posture else 4 * len(keys) + 3
    return verb, Pattern(order, path, subject, thing, modifiers, particles, rest, keys, rank, posture)
