"""Just enough English for labels and captions: the forms of a word, and whether a word of a caption is used as a verb.

Forms come from LemmInflect's dictionary (the SPECIALIST lexicon), which knows the part of speech: "dove" is a bird as a
noun and a form of "dive" as a verb. The rules of use are those that captions need, not a parser: a window of few words to
the left and right of a verb form, and the word lists of `words.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lemminflect
import yaml

ACTIVE, PASSIVE = 1, 2
TOKEN = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*|[.!?;,:]")
WORDS_PATH = Path(__file__).resolve().parent / "words.yaml"
_PRESENT = frozenset({"VB", "VBZ", "VBP"})
_BECOMING = frozenset({"being", "gets", "get", "getting", "got"})
_TURNED_AWAY = {("no", "longer"), ("instead", "of"), ("rather", "than")}


@dataclass(frozen=True)
class Words:
    """The lists of `words.yaml`; what each is for stands there."""

    determiners: frozenset[str]
    prepositions: frozenset[str]
    be: frozenset[str]
    have: frozenset[str]
    modals: frozenset[str]
    pronouns: frozenset[str]
    adverbs: frozenset[str]
    plurals: frozenset[str]
    negations: frozenset[str]
    breaks: frozenset[str]
    joining: frozenset[str]
    particles: frozenset[str]
    either: frozenset[str]
    fillers: frozenset[str]
    light: frozenset[str]
    stative: frozenset[str]
    nouns_too: frozenset[str]
    compounds: frozenset[str]
    camera: frozenset[str]
    camera_verbs: frozenset[str]
    """All forms of the verbs."""
    actors: frozenset[str]
    same: dict[str, tuple[str, ...]]
    """Verb of a label -> verbs of captions that may stand for it."""
    kinds: dict[str, tuple[str, ...]]
    """Any form of a noun -> the kinds it belongs to: "puppies" -> dog, animal."""
    persons: frozenset[str]
    """All forms of persons, and what acts for them."""
    animals: frozenset[str]
    """All forms of animals."""
    spelling: dict[str, tuple[str, ...]]
    """American spelling -> British ones."""


@cache
def load_words() -> Words:
    """Read the lists once."""
    raw = yaml.safe_load(WORDS_PATH.read_text(encoding="utf-8"))
    spelling: dict[str, tuple[str, ...]] = {}
    for british, american in raw.pop("spelling").items():
        spelling[american] = (*spelling.get(american, ()), british)
    same = {verb: tuple(others.split()) for verb, others in raw.pop("same").items()}
    members = {kind: others.split() for kind, others in raw.pop("kinds").items()}
    kinds: dict[str, list[str]] = {}
    for kind in members:
        for noun in _below(kind, members, set()):
            for form in noun_forms(noun):
                kinds.setdefault(form, []).append(kind)
    lists = {name: frozenset(text.split()) for name, text in raw.items()}
    lists["camera_verbs"] = frozenset(form for verb in lists["camera_verbs"] for form in verb_forms(verb))
    lists["fillers"] |= lists["joining"]
    persons = {form for form, above in kinds.items() if "person" in above} | {*noun_forms("person"), *lists["actors"]}
    animals = {form for form, above in kinds.items() if "animal" in above} | set(noun_forms("animal"))
    found = {form: tuple(dict.fromkeys(above)) for form, above in kinds.items()}
    return Words(
        **lists, same=same, kinds=found, persons=frozenset(persons), animals=frozenset(animals - persons), spelling=spelling
    )


def _below(kind: str, members: Mapping[str, Sequence[str]], seen: set[str]) -> Iterable[str]:
    """What is of a kind, through all levels; every word once."""
    for noun in members.get(kind, ()):
        if noun not in seen:
            seen.add(noun)
            yield noun
            yield from _below(noun, members, seen)


@cache
def lemma_of(word: str, part: str) -> str | None:
    """Dictionary form of a word as NOUN or VERB, or None where it is not one; of a hyphenated word, the last part's."""
    head, dash, tail = word.rpartition("-")
    lemmas = lemminflect.getAllLemmas(tail, part).get(part)
    if not lemmas and part == "VERB" and len(tail) > 5 and tail.endswith("ing") and not lemminflect.getAllLemmas(tail):
        return guessed_verb(word)  # "wakeboarding" and whatever else is newer than the dictionary
    if lemmas and tail == "leaves" and part == "NOUN":
        return head + dash + "leaf"  # the dictionary puts "leave" first, which no caption means
    return head + dash + lemmas[0] if lemmas else None


@cache
def _is_gerund(word: str) -> bool:
    """Whether a word is the -ing form of a verb, which "ring", "king" and "morning" are not."""
    return word.endswith("ing") and lemma_of(word, "VERB") not in (None, word)


def guessed_verb(gerund: str) -> str:
    """The verb of a gerund by its spelling alone."""
    head, dash, tail = gerund.rpartition("-")
    lemmas: tuple[str, ...] = lemminflect.getAllLemmasOOV(tail, "VERB").get("VERB") or (tail,)
    return head + dash + lemmas[0]


@cache
def verb_forms(lemma: str) -> dict[str, frozenset[str]]:
    """Every form of a verb with its Penn tags; a past form that has no participle beside it is the participle too."""
    head, dash, tail = lemma.rpartition("-")
    found = lemminflect.getAllInflections(tail, "VERB") or lemminflect.getAllInflectionsOOV(tail, "VERB")
    tags: dict[str, set[str]] = {}
    for tag, forms in found.items():
        for form in forms:
            tags.setdefault(head + dash + form, set()).add(tag)
    if "VBN" not in found:
        for forms_tags in tags.values():
            if "VBD" in forms_tags:
                forms_tags.add("VBN")
    return {form: frozenset(all_tags) for form, all_tags in tags.items()}


@cache
def noun_forms(lemma: str) -> tuple[str, ...]:
    """Singular and plurals of a noun."""
    head, dash, tail = lemma.rpartition("-")
    found = lemminflect.getAllInflections(tail, "NOUN")
    return tuple(dict.fromkeys([lemma, *(head + dash + form for tag in ("NN", "NNS") for form in found.get(tag, ()))]))


@cache
def only_adjective(word: str) -> bool:
    """Whether the dictionary has a word as an adjective and as nothing else: what follows it is a noun."""
    return set(lemminflect.getAllLemmas(word)) == {"ADJ"}


@cache
def is_adverb(word: str) -> bool:
    """Whether a word may stand between a subject and its verb: "slowly", "then"; "family" may not."""
    return word in load_words().adverbs or (word.endswith("ly") and lemma_of(word, "NOUN") is None)


def use_of(words: Sequence[str], at: int, start: int, tags: frozenset[str]) -> int:
    """How the verb form at `at` is used: ACTIVE, PASSIVE, or 0 for a noun, an adjective, a state or a negated verb.

    `start` is where its sentence begins; `tags` are the Penn tags that the form may have.
    """
    lists = load_words()
    before = at - 1
    while before >= start and is_adverb(words[before]):
        before -= 1
    site = _Site(words, at, before, start, words[at], words[before] if before >= start else "", words[at + 1 : at + 2][0])
    if _negated(site, lists):
        return 0
    if "VBG" in tags:
        return _use_of_gerund(site, lists)
    if site.previous == "s":  # "the man's walk" against "he's thrown"
        return PASSIVE if "VBN" in tags and words[before - 1] in lists.pronouns else 0
    if "VBN" in tags and tags.isdisjoint(_PRESENT):
        return _use_of_past(site, tags, lists)
    return _use_of_present(site, tags, lists)


class _Site(NamedTuple):
    """A verb form and the words around it; `previous` skips adverbs and is "" at the start of the sentence."""

    words: Sequence[str]
    at: int
    before: int
    start: int
    word: str
    previous: str
    following: str


def _negated(site: _Site, lists: Words) -> bool:
    words = site.words
    for k in range(site.at - 1, max(site.start, site.at - 4) - 1, -1):
        if words[k] in (",", "and", "while"):
            break
        if words[k] in lists.negations or (words[k], words[k + 1]) in _TURNED_AWAY:
            return True
    return words[site.start] in ("nobody", "nothing") or (words[site.start], words[site.start + 1]) == ("no", "one")


def _use_of_gerund(site: _Site, lists: Words) -> int:
    word, previous, following = site.word, site.previous, site.following
    if f"{word}-{following}" in lists.compounds or f"{word}-{following.removesuffix('s')}" in lists.compounds:
        return 0
    if previous == "s":
        return ACTIVE if site.words[site.before - 1] in lists.pronouns else 0
    if following == "of" and previous not in lists.be:
        return 0  # "an oil painting of a ship"
    living = following in lists.persons or following in lists.animals
    if previous in lists.determiners or previous == "for" or _describes(previous, lists):
        return ACTIVE if living else 0  # "a crying baby" cries; "a running shoe" does not run
    return ACTIVE


def _use_of_past(site: _Site, tags: frozenset[str], lists: Words) -> int:
    previous, following = site.previous, site.following
    state = site.word in lists.stative
    if previous in lists.have:
        return ACTIVE
    if previous in lists.be:
        return PASSIVE if not state or previous in _BECOMING else 0
    if previous in lists.determiners or previous in lists.prepositions or _describes(previous, lists):
        return 0
    if following == "by" and not state:
        return PASSIVE
    if "VBD" not in tags:
        return PASSIVE if not state and previous not in ("", ",") else 0
    if following in lists.determiners:
        return ACTIVE
    return 0 if state or previous in ("", ",") else ACTIVE


def _use_of_present(site: _Site, tags: frozenset[str], lists: Words) -> int:
    words, word, previous, following = site.words, site.word, site.previous, site.following
    noun_too = word in lists.nouns_too
    object_follows = following in lists.determiners or following in lists.adverbs or following in ("at", "to")
    if previous in lists.modals:
        return ACTIVE if "VB" in tags and (object_follows or not noun_too) else 0
    if previous in lists.determiners or previous in lists.prepositions:
        return 0
    if previous == "":
        return ACTIVE if following in lists.determiners else 0
    if previous in ("and", "or", "then", ","):
        return ACTIVE if object_follows or not noun_too else 0
    living = previous in lists.pronouns or previous in lists.persons or previous in lists.animals
    if not living and (_describes(previous, lists) or _is_gerund(previous)):
        return 0  # "large waves", "taking steps"
    clear = living or site.before < site.at - 1 or object_follows
    if "VB" not in tags:
        return ACTIVE if clear or not noun_too or _waits_for_verb(site, lists) else 0
    both = "and" in words[max(site.start, site.before - 3) : site.before]
    many = _is_plural(previous, lists) or (living and both)
    if many or previous in ("who", "that"):
        return ACTIVE if clear or not noun_too else 0
    apart = any(_is_plural(words[k], lists) and words[k + 1] in lists.prepositions for k in range(site.start, site.before))
    return ACTIVE if apart and (object_follows or not noun_too) else 0  # "leaves of a tree sway"


def _describes(word: str, lists: Words) -> bool:
    return bool(word) and word not in lists.persons and word not in lists.animals and only_adjective(word)


def _is_plural(word: str, lists: Words) -> bool:
    return word in lists.plurals or (word.endswith("s") and lemma_of(word, "NOUN") not in (None, word))


def _waits_for_verb(site: _Site, lists: Words) -> bool:
    """Whether a person or an animal stands before, in this clause, with no verb yet: "a man in an apron grills ..."."""
    for k in range(site.before, site.start - 1, -1):
        word = site.words[k]
        if word in lists.breaks or word == "," or word in lists.be or _is_gerund(word):
            return False
        if word in lists.persons or word in lists.animals:
            after = site.words[k + 1]
            verb_follows = after.endswith("s") and lemma_of(after, "VERB") is not None
            return not verb_follows and (k == site.start or site.words[k - 1] not in lists.prepositions)
    return False
