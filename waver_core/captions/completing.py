"""Prompts about moving shapes, made into captions: said as the attribute captioner says it, and filled in where they are open.

"a blue circle going up" becomes "A medium-sized blue disc moves up over a white background.", which is how the captions read
that a model of the embedded profile was trained on (Waver §4.6). A prompt that says anything that the facts cannot hold is
not touched.
"""

from __future__ import annotations

import re
from dataclasses import replace

from waver_core.captions.colours import CHROMATIC
from waver_core.captions.facts import LIGHTS, SPEEDS, ObjectFacts, Phase, SceneFacts
from waver_core.captions.parsing import _COLOUR_WORDS, _NOUNS, _NUMBERS, _PLURALS, _SIZE_WORDS, _SPEED_WORDS, parse
from waver_core.captions.sentences import full_text, short_text


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


USUAL_SIZE = "medium-sized"
USUAL_DIRECTION = "right"
_GROUNDS = ("white", "black", "grey")
_MAX_OBJECTS = 4
_MAX_CHARS = 1500
_WORD = re.compile(r"\d+(?:\.\d+)?%?|[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s.,;:!?\"%-]")
_WAYS = {
    **dict.fromkeys(("up", "upward", "upwards", "upper", "top", "rise", "rises", "rising", "climb", "climbs", "climbing"), "up"),
    **dict.fromkeys(("down", "downward", "downwards", "lower", "bottom", "fall", "falls", "falling", "sinks", "sinking"), "down"),
    **dict.fromkeys(("left", "leftward", "leftwards"), "left"),
    **dict.fromkeys(("right", "rightward", "rightwards"), "right"),
    **dict.fromkeys(("centre", "center", "middle"), "centre"),
    **dict.fromkeys(("forth", "bounce", "bounces", "bouncing"), "forth"),
    **dict.fromkeys(("shake", "shakes", "shaking", "shaky"), "shake"),
    **dict.fromkeys(("pan", "pans", "panning"), "pan"),
    **dict.fromkeys(("tilt", "tilts", "tilting"), "tilt"),
    **dict.fromkeys(("zoom", "zooms", "zooming"), "zoom"),
    **{word: word for word in ("camera", "above", "below", "light", "then", "about", "out", *LIGHTS)},
    **dict.fromkeys(("still", "motionless", "stationary", "static", "fixed", "rest", "rests"), "still"),
}
_MOVING = _words(
    "move moves moving slide slides sliding drift drifts drifting travel travels travelling traveling go goes going fly flies "
    "flying glide glides gliding roll rolls rolling float floats floating rise rises rising climb climbs climbing fall falls "
    "falling sinks sinking"
)
_PLAIN = _words(
    "a an the and is are of to at in on over across before with while as it its that which from against by towards toward "
    "another one back diagonally stay stays stand stands start starts starting begins beginning background backdrop scene "
    "picture frame image screen side corner edge part plain solid video clip animation shot object text reads short per second "
    "s main colour colours color colors"
)
_ON_COLOUR = re.compile(rf"\b(on|over|against) (?:an? )?(?:plain )?({'|'.join(_COLOUR_WORDS)})(?= *(?:[.,;]|$))", re.IGNORECASE)
_END_TO_END = re.compile(r"\bfrom (?:the )?(left|right|top|bottom) to (?:the )?(left|right|top|bottom)\b", re.IGNORECASE)
_NOT_MOVING = re.compile(r"\b(?:does not|doesn['’]t|is not|isn['’]t) mov(?:e|ing)\b", re.IGNORECASE)
_OTHER_END = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def completed(prompt: str, moving: bool = True) -> str | None:
    """The caption, or None for a prompt that is not wholly about shapes; a caption that leaves nothing open comes out as it is.

    Open are: size, colour, and the background's colour; and the direction of a thing that is said to move, unless `moving`
    is False (a still picture). A thing of which no motion is said gets none, as in captions of pictures. A thing without a
    word for its shape is not one of this world.
    """
    if len(prompt) > _MAX_CHARS:
        return None
    text = _ON_COLOUR.sub(r"\1 a \2 background", _NOT_MOVING.sub("stays still", prompt))
    if (said := _concepts(text)) is None:
        return None
    facts = parse(text)
    if not 0 < len(facts.objects) <= _MAX_OBJECTS or not all(thing.shape for thing in facts.objects):
        return None
    caption = _written(facts)
    kept = _concepts(caption) if caption else None
    if kept is None:
        return None
    lost = said - kept
    if _moves(text) and not any(thing.phases for thing in facts.objects):
        if not moving or len(facts.objects) > 1 or len(lost) > 1 or not lost <= set(SPEEDS):
            return None
        motion = Phase(USUAL_DIRECTION, next(iter(lost), None))
        return _written(_filled(replace(facts, objects=(replace(facts.objects[0], phases=(motion,)),))))
    return None if lost else _written(_filled(facts))


def _written(facts: SceneFacts) -> str | None:
    """The short caption where it holds all of the facts, or else the full one; None where neither can be read back."""
    texts = (short_text(facts), full_text(facts))
    return next((text for text in texts if len(text) <= _MAX_CHARS and parse(text) == facts), None)


def _filled(facts: SceneFacts) -> SceneFacts:
    """The facts with the open ones filled in, so that nothing stands before a ground of its own colour."""
    used = [thing.colour for thing in facts.objects] + list(facts.background)
    objects: list[ObjectFacts] = []
    for thing in facts.objects:
        colour = thing.colour or next(c for c in CHROMATIC if c not in used)
        used.append(colour)
        objects.append(replace(thing, size=thing.size or USUAL_SIZE, colour=colour))
    # At most `_MAX_OBJECTS` colours are taken, which may be these three.
    grounds = (*_GROUNDS, *CHROMATIC)
    return replace(facts, objects=tuple(objects), background=facts.background or (next(c for c in grounds if c not in used),))


def _moves(prompt: str) -> bool:
    return any(word in _MOVING for word in re.findall(r"[a-z]+", prompt.lower()))


def _concepts(text: str) -> set[str] | None:
    """What the words of a text stand for, words without content left out; None where one of them is not known."""
    text = _END_TO_END.sub(lambda m: m[0] if _OTHER_END[m[1].lower()] != m[2].lower() else f"to the {m[2]}", text)
    found = set()
    counted = False
    for word in _WORD.findall(re.sub(r'"[^"]*"', "", text).lower()):
        if word in _NUMBERS:
            counted = True
        elif (concept := _concept(word)) is None or (word in _PLURALS and word != "crosses" and not counted):
            return None
        elif concept:
            found.add(concept)
    return found


def _concept(word: str) -> str | None:
    """The word's meaning, "" for one without content, None for one that is not known."""
    for known in (_COLOUR_WORDS, _WAYS, _SIZE_WORDS, _SPEED_WORDS, _NOUNS):
        if word in known:
            return known[word]
    if word in _PLURALS:
        return _NOUNS[_PLURALS[word]]
    if word in _PLAIN or word in _MOVING:
        return ""
    return word if word[0].isdigit() else None
