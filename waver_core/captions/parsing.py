"""English to facts: reads back what `sentences` writes, and plain prompts such as "A red disc moves to the left over a
green background while the camera pans right". Words it does not know are ignored.
"""

from __future__ import annotations

import re
from dataclasses import replace

from waver_core.captions.facts import COLOURS, LIGHTS, SHAPES, SIZES, SPEEDS, ObjectFacts, Phase, SceneFacts


def _synonyms(words: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in words.split())


_COLOUR_WORDS = {c: c for c in COLOURS} | _synonyms(
    "gray=grey violet=purple scarlet=red crimson=red golden=yellow navy=blue turquoise=cyan tan=beige fuchsia=magenta"
)
_NOUNS = {s: s for s in SHAPES} | _synonyms(
    "circle=disc disk=disc ball=disc dot=disc box=square rhombus=diamond donut=ring plus=cross object= thing= shape= something="
)
_PLURALS = {f"{n}s": n for n in _NOUNS if n not in ("cross", "box", "something")} | {"crosses": "cross", "boxes": "box"}
_SIZE_WORDS = {s: s for s in SIZES} | _synonyms("tiny=small little=small medium=medium-sized big=large huge=large")
_SPEED_WORDS = {s: s for s in SPEEDS} | {"slow": "slowly", "fast": "quickly", "quick": "quickly", "rapidly": "quickly"}
_NUMBERS = {"two": 2, "three": 3, "four": 4}
_FRESH = {"a", "an", "another", "one", "some"}
_STOPS = re.compile(
    r"^(and|while|then|there|is|are|of|to|at|in|on|over|with|past|by|from|behind|above|below|beside|near|under|as|"
    r"moves?|stays?|starts?|goes|slides?|drifts?|camera)$"
)
_TOKEN = re.compile(r"[a-z]+(?:-[a-z]+)*|\d+(?:\.\d+)?%?|[,;:]")

_PAN = r"(?:pan|turn|move|swing|travel|truck|track)"
_CAMERA = re.compile(
    r"\b(?:while |as |and )?(?:the |a )?camera(?:'s)? (?:(?:slowly|steadily|quickly|is|slightly|gently) )*(?:"
    rf"(?P<still>stays still|stays? fixed|holds? still|stands still|does not move|(?:is )?(?:static|still|fixed|locked))|"
    rf"(?P<pan>{_PAN}(?:s|ning|ing)?) (?:slowly |quickly |steadily )?(?:to(?:wards)? )?(?:the )?(?P<side>left|right)(?:wards?)?|"
    r"(?:tilt(?:s|ing)?|pans?|moves?) (?:slowly |quickly |steadily )?(?P<tilt>up|down)(?:wards?)?|"
    r"zoom(?:s|ing)? (?:slowly |quickly |steadily )?(?P<zoom>in|out)|(?P<shake>shak(?:es?|ing)|is shaky))"
)
_STATIC_SHOT = re.compile(r"\b(?:static|fixed|still) (?:camera|shot)\b")
_COLOUR = "|".join(sorted(_COLOUR_WORDS, key=len, reverse=True))
_COLOUR_LIST = rf"(?:{_COLOUR})(?:(?:, | and |, and | )(?:{_COLOUR}))*"
_OVER = r"(?:over|on|against|in front of|before|with|across)"
_BACKGROUND = re.compile(
    rf"\b(?:the (?:background is|main colours? (?:are|is)) (?P<is>{_COLOUR_LIST})|"
    rf"(?:{_OVER} )?(?:an? |the )?(?:[a-z]+ ){{0,2}}?(?P<of>{_COLOUR_LIST}) (?:[a-z]+ )?(?:background|backdrop|ground|scene))\b"
)
_LIGHT = re.compile(rf"\bthe light is (?P<is>{'|'.join(LIGHTS)})\b|\bin (?P<of>{'|'.join(LIGHTS)}) light\b")
_RELATION = re.compile(r"\b(?:is|lies) (?:to the (?:left|right) of|above|below|under) ")
_POSITION = re.compile(
    r"(?:,? ?(?:starting|starts|start|beginning|begins) )?\b(?:in|at|near|on) the (?P<where>"
    r"upper left|upper right|lower left|lower right|"
    r"top left|top right|bottom left|bottom right|top|bottom|left|right|centre|center|middle)"
    r"(?: (?:corner|side|edge|half|part))?(?: of the (?:picture|frame|image|screen))?"
)
_SPAN = re.compile(r"\bfrom (?P<start>\d+(?:\.\d+)?) ?s(?:econds?)? to (?P<end>\d+(?:\.\d+)?) ?s(?:econds?)?\b")
_SPEED = re.compile(r"\bat (?:about )?(?P<percent>\d+)% of the (?:picture's )?short side per second\b")
_FROM_TO = re.compile(r"\bfrom (?:the )?(?:left|right|top|bottom|upper [a-z]+|lower [a-z]+) to(?: the)? ")
_REST = re.compile(r"\b(?:stays? still|stands? still|does not move|rests?|is still|is at rest|motionless|stationary|stays put)\b")
_BACK = re.compile(r"\b(?:back and forth|to and fro|bounc(?:es?|ing)|(?:from )?side to side)\b")
_ABOUT = re.compile(r"\bmov(?:es?|ing) about\b")
_MOVE = re.compile(
    r"\b(?:mov|slid|drift|travel|go|fl(?:y|ies)|glid|roll|float|ris|fall|head|dart|pass|cross(?:es|ing)|run|swim|climb|sink|shift|race|creep)"
)


def parse(text: str) -> SceneFacts:
    """Facts of a caption or prompt; empty where it says nothing that is known."""
    texts = tuple(re.findall(r'"([^"]*)"', text))
    camera = light = None
    background: tuple[str, ...] = ()
    objects: list[ObjectFacts] = []
    for sentence in re.split(r"(?<=[a-z%])\.(?:\s+|$)|[!?\n]", re.sub(r'"[^"]*"', "", text).lower()):
        if _RELATION.search(sentence):
            continue
        if found := _CAMERA.search(sentence):
            camera, sentence = _camera_of(found), _without(sentence, found)
        elif found := _STATIC_SHOT.search(sentence):
            camera, sentence = "static", _without(sentence, found)
        if found := _BACKGROUND.search(sentence):
            background = _colours_of(found["is"] or found["of"])
            sentence = _without(sentence, found)
        if found := _LIGHT.search(sentence):
            light, sentence = found["is"] or found["of"], _without(sentence, found)
        _read_objects(sentence, objects)
    return SceneFacts(background, light, camera, tuple(objects), texts)


def _without(sentence: str, found: re.Match[str]) -> str:
    return f"{sentence[: found.start()]} {sentence[found.end() :]}"


def _camera_of(found: re.Match[str]) -> str:
    if found["side"]:
        return f"pan_{found['side']}"
    if found["tilt"]:
        return f"tilt_{found['tilt']}"
    if found["zoom"]:
        return f"zoom_{found['zoom']}"
    return "shake" if found["shake"] else "static"


def _colours_of(words: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_COLOUR_WORDS[w] for w in re.findall(r"[a-z]+", words) if w in _COLOUR_WORDS))


def _read_objects(sentence: str, objects: list[ObjectFacts]) -> None:
    """Find what is named in a sentence, and what is said of each up to the next; new things are appended, known ones kept."""
    tokens = [(m.group(), m.start(), m.end()) for m in _TOKEN.finditer(sentence)]
    mentions: list[tuple[int, int, ObjectFacts | None, bool, int]] = []
    for at, (word, start, end) in enumerate(tokens):
        noun = _PLURALS.get(word, word)
        if word == "crosses" and (not at or tokens[at - 1][0] not in {*_COLOUR_WORDS, *_SIZE_WORDS, *_NUMBERS}):
            continue  # the verb
        if word == "it":
            mentions.append((start, end, None, False, 1))
        elif noun in _NOUNS:
            begin, thing, fresh, count = _noun_phrase(tokens, at, _NOUNS[noun])
            mentions.append((begin, end, thing, fresh, count if word in _PLURALS else 1))
    last = len(objects) - 1
    for number, (_, end, found, fresh, count) in enumerate(mentions):
        said = sentence[end : mentions[number + 1][0] if number + 1 < len(mentions) else None]
        if found is not None:
            known = None if fresh else _known(found, objects)
            if known is None:
                objects.extend([found] * count)
                last, first = len(objects) - 1, len(objects) - count
            else:
                last = first = known
        elif last < 0:
            continue
        else:
            first = last
        for index in range(first, last + 1):
            objects[index] = _say(objects[index], said)


def _noun_phrase(tokens: list[tuple[str, int, int]], at: int, shape: str) -> tuple[int, ObjectFacts, bool, int]:
    """Walk back from a noun over its adjectives to the article: start, what the words say, whether it is new, how many."""
    colour = size = None
    begin, fresh, count = tokens[at][1], True, 1
    for word, start, _ in reversed(tokens[max(0, at - 5) : at]):
        if word in _FRESH or word in _NUMBERS:
            begin, count = start, _NUMBERS.get(word, 1)
            break
        if word in ("the", "its", "this"):
            begin, fresh = start, False
            break
        if _STOPS.match(word) or not word[0].isalpha():
            break
        colour = _COLOUR_WORDS.get(word, colour)
        size = _SIZE_WORDS.get(word, size)
        begin = start
    return begin, ObjectFacts(colour, shape or None, size), fresh, count


def _known(thing: ObjectFacts, objects: list[ObjectFacts]) -> int | None:
    """The last object that fits what is said of this one."""
    for index in reversed(range(len(objects))):
        pairs = ((thing.colour, objects[index].colour), (thing.shape, objects[index].shape), (thing.size, objects[index].size))
        if all(a is None or a == b for a, b in pairs):
            return index
    return None


def _say(thing: ObjectFacts, said: str) -> ObjectFacts:
    """Add to an object what is said of it."""
    phases = list(thing.phases)
    for part in re.split(r"\bthen\b", said):
        span, speed = _SPAN.search(part), _SPEED.search(part)
        rest = _SPEED.sub(" ", _SPAN.sub(" ", part))
        rest = _FROM_TO.sub(" to the ", rest)
        if (found := _POSITION.search(rest)) and thing.position is None:
            thing = replace(thing, position=_position_of(found["where"]))
        rest = _POSITION.sub(" ", rest)
        motion = _motion_of(rest, bool(phases))
        if motion is None:
            continue
        word = next((_SPEED_WORDS[w] for w in re.findall(r"[a-z]+", rest) if w in _SPEED_WORDS), None)
        start_s, end_s = (float(span["start"]), float(span["end"])) if span else (None, None)
        phases.append(Phase(motion, word, int(speed["percent"]) / 100 if speed else None, start_s, end_s))
    return replace(thing, phases=tuple(phases))


def _position_of(where: str) -> str:
    words = where.replace("top ", "upper ").replace("bottom ", "lower ")
    return "centre" if words in ("center", "middle") else words


def _motion_of(words: str, under_way: bool) -> str | None:
    """The motion that a stretch of text tells; sides count only with a verb of motion, or after a first motion."""
    if _BACK.search(words):
        return "back_and_forth"
    if _ABOUT.search(words):
        return "unsteady"
    if _REST.search(words):
        return "rest"
    if not _MOVE.search(words) and not under_way:
        return None
    found = re.findall(r"\b(up|down|left|right|top|bottom|ris|fall|sink|climb|upper|lower)", words)
    vertical = next((w for w in found if w not in ("left", "right")), "")
    side = next((w for w in found if w in ("left", "right")), "")
    upright = "up" if vertical in ("up", "top", "ris", "climb", "upper") else "down" if vertical else ""
    return "_".join(w for w in (upright, side) if w) or None
