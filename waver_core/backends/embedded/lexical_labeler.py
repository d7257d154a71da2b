"""Action labels by matching words: what the embedded profile has in place of Qwen2.5-32B-Instruct (Waver §3.4).

A label matches a sentence of a caption that uses the label's verb as a verb and holds its other content words where that
verb can have them: the object after an active verb or before a passive one, the subject of an animal or a thing before
the verb, places anywhere near. Of all that match, the label with most words wins, then exact words over kinds ("puppy"
over "dog"), then the earlier mention, then the order of the taxonomy. It knows no more of meaning than the word lists of
`waver_core/taxonomy/words.yaml`: an action told in other words than the taxonomy's gets a more general label or none.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import cache, cached_property

from waver_core.backends.contracts import NO_ACTION, ActionLabel
from waver_core.config import digest_of
from waver_core.registry import register
from waver_core.taxonomy import load_taxonomy
from waver_core.taxonomy.grammar import ACTIVE, PASSIVE, TOKEN, WORDS_PATH, Words, is_adverb, load_words, use_of
from waver_core.taxonomy.patterns import Entry, Group, Pattern, build_index

_REACH = 9
"""Tokens between a verb and its object, at most."""
_NEAR = 14
"""Tokens between a verb and its other words, at most."""
_BESIDE = 5
"""Tokens between a verb and its direction ("picks the ball up"), or between a noun and what describes it, at most."""
_OTHER_KIND = 5
"""Rank, more than a word's, that a label loses whose subject is beside the point: one of people after an animal, one of
things ("sparks flying") after a person."""
_LOOSE_RANK = 3
"""A label that matches partly is looked for when no better rank was found: at most a bare verb."""
_END = frozenset(".!?;")
_Found = tuple[tuple[int, ...], ActionLabel]


@register("action_labeler", "lexical")
class LexicalLabeler:
    """Labels about 20,000 captions of 60 words a second on one core."""

    def __init__(self, taxonomy_path: str | None = None) -> None:
        self.taxonomy = labels = load_taxonomy(taxonomy_path)
        words = digest_of(WORDS_PATH.read_text(encoding="utf-8"))
        self.fingerprint = f"lexical-1:{labels.digest}:{words}:lemminflect-{importlib.metadata.version('lemminflect')}"
        self._path = taxonomy_path

    @cached_property
    def _camera(self) -> frozenset[str]:
        return load_words().camera

    @cached_property
    def _groups(self) -> dict[str, Group]:
        return _index_of(self._path)[0]

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return _index_of(self._path)[1]

    def label(self, captions: Sequence[str]) -> list[ActionLabel | Exception]:
        """One label per caption, in order; NO_ACTION where no label matches. The first call makes the index."""
        return [self._label(caption) for caption in captions]

    def _label(self, caption: str) -> ActionLabel:
        words = TOKEN.findall(caption.lower())
        words.append(".")
        if not self._camera.isdisjoint(words):
            words = _without_camera(words, load_words())
        if "it" in words:
            _name_it(words, load_words())
        sentences = self._sentences(words)
        best: _Found | None = None
        for sentence in sentences:
            best = self._best(sentence, best)
        if best is None or best[0][0] <= _LOOSE_RANK:
            for sentence in sentences:
                best = self._best_loose(sentence, best)
        return best[1] if best else NO_ACTION

    def _sentences(self, words: list[str]) -> list[_Sentence]:
        """The sentences that hold a verb of the taxonomy."""
        found = []
        start = 0
        heads: list[int] = []
        present: dict[str, list[int]] = {}
        for at, entry in enumerate(map(self._entries.get, words)):
            if entry is None:
                if words[at] in _END:
                    if heads:
                        found.append(_Sentence(words, start, heads, present, self._entries))
                        heads = []
                    present, start = {}, at + 1
                continue
            for key in entry.keys:
                if key in present:
                    present[key].append(at)
                else:
                    present[key] = [at]
            if entry.verbs:
                heads.append(at)
        return found

    def _best(self, sentence: _Sentence, best: _Found | None) -> _Found | None:
        """The better of `best` and the labels that match wholly."""
        present = sentence.present.keys()
        for at in sentence.heads:
            for lemma, tags in self._entries[sentence.words[at]].verbs:
                group = self._groups[lemma]
                for key in group.by_key.keys() & present:
                    for pattern in group.by_key[key]:
                        if (best is None or pattern.rank >= best[0][0]) and pattern.keys <= present:
                            best = sentence.better(best, at, tags, pattern)
                for pattern in group.alone:
                    if best is None or pattern.rank >= best[0][0]:
                        best = sentence.better(best, at, tags, pattern)
        return best

    def _best_loose(self, sentence: _Sentence, best: _Found | None) -> _Found | None:
        """The better of `best` and the labels of which only the verb and its object or subject match."""
        for at in sentence.heads:
            for lemma, tags in self._entries[sentence.words[at]].verbs:
                group = self._groups[lemma]
                partly = (pattern for key in group.loose.keys() & sentence.present.keys() for pattern in group.loose[key])
                for pattern in (*group.bare, *partly):
                    if pattern.keys <= sentence.present.keys():
                        best = sentence.better(best, at, tags, pattern)
        return best


@cache
def _index_of(taxonomy_path: str | None) -> tuple[dict[str, Group], dict[str, Entry]]:
    """The index of a taxonomy; it takes most of a second, so all labelers of a process share it."""
    return build_index(load_taxonomy(taxonomy_path))


class _Sentence:
    """A sentence with verbs at `heads`; how well patterns fit around them."""

    def __init__(
        self, words: list[str], start: int, heads: list[int], present: dict[str, list[int]], entries: dict[str, Entry]
    ) -> None:
        self.words, self.start, self.heads, self.present, self._entries = words, start, heads, present, entries
        self._uses: dict[tuple[int, frozenset[str]], int] = {}
        self._actors: dict[int, str] = {}
        self._object_ends: dict[int, int] = {}

    def better(self, best: _Found | None, at: int, tags: frozenset[str], pattern: Pattern) -> _Found | None:
        """The better of `best` and the pattern at a verb; the label's order is in the score, so that nothing ties."""
        use = self._use(at, tags)
        if use and (score := self._score(at, use, pattern)) and (best is None or score > best[0]):
            return score, pattern.path
        return best

    def _use(self, at: int, tags: frozenset[str]) -> int:
        found = self._uses.get((at, tags))
        if found is None:
            found = self._uses[at, tags] = use_of(self.words, at, self.start, tags)
        return found

    def _score(self, at: int, use: int, pattern: Pattern) -> tuple[int, ...] | None:
        """(rank, exact words, earliness, closeness, order), higher is better; None where the pattern does not match."""
        rank = pattern.rank
        matched: list[tuple[str, int]] = []
        if pattern.subject:
            place = self._before(at, use, pattern.subject) if use == ACTIVE else None
            if place is None:
                return None
            matched.append((pattern.subject, place))
            lists = load_words()
            if self.words[place] not in lists.animals and not lists.persons.isdisjoint(self.words[self.start : place + 1]):
                rank -= _OTHER_KIND
        elif use == ACTIVE and (actor := self._actor(at)) != "person":
            if not pattern.keys or (pattern.posture and not actor):
                return None
            rank -= _OTHER_KIND if actor == "animal" else 0
        if pattern.object:
            place = self._after(at, pattern.object) if use == ACTIVE else self._before(at, use, pattern.object)
            if place is None:
                return None
            matched.append((pattern.object, place))
        elif use == PASSIVE and pattern.keys:
            return None
        for key in pattern.modifiers:
            near = [p for p in self.present[key] if matched[-1][1] - _BESIDE <= p < matched[-1][1]] if matched else []
            if not near:
                return None
            matched.append((key, near[-1]))
        for key in pattern.particles:
            near = [p for p in self.present[key] if at < p <= at + _BESIDE and "from" not in self.words[max(at, p - 2) : p]]
            if not near:  # "from left to right" goes to the right
                return None
            matched.append((key, near[0]))
        taken = {at, *(place for _, place in matched)}
        for key in pattern.rest:
            near = [p for p in self.present[key] if p not in taken and self._goes_with(at, p)]
            if not near:
                return None
            matched.append((key, min(near, key=lambda p: abs(p - at))))
        exact = sum(key in entry.keys[: entry.own] for key, p in matched if (entry := self._entries[self.words[p]]))
        return rank, exact - pattern.same, -at, -sum(abs(p - at) for _, p in matched), -pattern.order

    def _actor(self, at: int) -> str:
        """What the nearest living being before a verb is: "person", "animal" or ""; a verb that comes first is a person's."""
        if at not in self._actors:
            lists = load_words()
            self._actors[at] = "person" if at == self.start else ""
            for word in reversed(self.words[self.start : at]):
                if word in lists.persons or word in lists.animals:
                    self._actors[at] = "person" if word in lists.persons else "animal"
                    break
        return self._actors[at]

    def _before(self, at: int, use: int, key: str) -> int | None:
        """Where the subject of an active verb or the object of a passive one stands: the nearest, unless people come between."""
        for place in reversed(self.present[key]):
            if place < at <= place + _NEAR and not self._broken(place, at):
                people = use == ACTIVE and not load_words().persons.isdisjoint(self.words[place + 1 : at])
                return None if people else place
        return None

    def _after(self, at: int, key: str) -> int | None:
        """Where the object of an active verb stands."""
        if at not in self._object_ends:
            self._object_ends[at] = self._object_end(at)
        return next((place for place in self.present[key] if at < place < self._object_ends[at]), None)

    def _object_end(self, at: int) -> int:
        """Where the object of the verb must have come: before a preposition, another clause and another verb."""
        words, lists = self.words, load_words()
        joined = True  # "throws and catches a ball": both verbs have the object
        end = min(len(words), at + 1 + _REACH)
        for k in range(at + 1, end):
            word = words[k]
            if word in _END or word in lists.breaks or (word in lists.joining and word not in ("of", "on", "with", "and", "or")):
                return k
            if word == "and" and words[k + 1] in lists.determiners:
                return k
            if not joined and k in self.heads:
                again = words[k - 1] in ("and", "or", ",", "then")
                forms = (tags for _, tags in self._entries[word].verbs if "VBG" in tags or (again and "VBZ" in tags))
                if any(self._use(k, tags) for tags in forms):
                    return k
            joined = joined and (word in ("and", "or", ",") or words[k - 1] in ("and", "or", ","))
        return end

    def _goes_with(self, at: int, place: int) -> bool:
        """Whether a place, tool or partner belongs to a verb; people before the verb are those who act."""
        if abs(place - at) > _NEAR or (place < at and self.words[place] in load_words().persons):
            return False
        return not self._broken(at, place)

    def _broken(self, one: int, other: int) -> bool:
        """Whether another clause begins between two places."""
        return not load_words().breaks.isdisjoint(self.words[min(one, other) + 1 : max(one, other)])


def _without_camera(words: list[str], lists: Words) -> list[str]:
    """The caption less what the camera does: from it to the end of the clause."""
    kept: list[str] = []
    start = 0
    for at, word in enumerate(words):
        if at < start or word not in lists.camera:
            continue
        after = at + 1
        while is_adverb(words[after]):
            after += 1
        of_something = at > 1 and words[at - 1] in lists.determiners and words[at - 2] in lists.prepositions
        if words[after] not in lists.camera_verbs or of_something:
            continue  # "a man looks at the camera and smiles"
        kept += words[start:at]
        while words[after] not in _END and words[after] not in lists.breaks and words[after] != ",":
            after += 1
        start = after
    return kept + words[start:]


def _name_it(words: list[str], lists: Words) -> None:
    """Put in place of "it" the animal or thing that an earlier sentence names first: "A disc starts at the left. It moves"."""
    named = ""
    candidate = ""
    for at, word in enumerate(words):
        if word in _END:
            named, candidate = candidate or named, ""
        elif word == "it" and named:
            words[at] = candidate = named
        elif not candidate and (word in lists.animals or "object" in lists.kinds.get(word, ())):
            candidate = word
