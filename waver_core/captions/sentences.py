"""Facts to English (Waver §3.3): a small deterministic grammar that `parsing` reads back without loss."""

from __future__ import annotations

from waver_core.backends.contracts import SubAction
from waver_core.captions.facts import POSITIONS, ObjectFacts, Phase, SceneFacts

CAMERA_SENTENCES = {
    "static": "The camera stays still.",
    "pan_left": "The camera pans to the left.",
    "pan_right": "The camera pans to the right.",
    "tilt_up": "The camera tilts up.",
    "tilt_down": "The camera tilts down.",
    "zoom_in": "The camera zooms in.",
    "zoom_out": "The camera zooms out.",
    "shake": "The camera shakes.",
}
MOTION_WORDS = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "up_left": "moves up and to the left",
    "up_right": "moves up and to the right",
    "down_left": "moves down and to the left",
    "down_right": "moves down and to the right",
    "rest": "stays still",
    "back_and_forth": "moves back and forth",
    "unsteady": "moves about",
}


def full_text(facts: SceneFacts) -> str:
    """The whole caption: objects, background, light, camera, positions to one another, text; what is unknown is left out."""
    parts = [_object_sentences(o) for o in facts.objects]
    if facts.background:
        # Where nothing stands out from it, a background is not told apart from the rest.
        known = any(o.shape for o in facts.objects)
        several = "main colours are" if len(facts.background) > 1 else "main colour is"
        parts.append(f"The {'background is' if known else several} {_and(facts.background)}.")
    if facts.light:
        parts.append(f"The light is {facts.light}.")
    if facts.camera:
        parts.append(CAMERA_SENTENCES[facts.camera])
    parts += [f"{s[0].upper()}{s[1:]}." for s in spatial_sentences(facts)]
    parts += [f'The text reads "{text}".' for text in facts.texts]
    return " ".join(parts) or "Nothing was measured with confidence."


def short_text(facts: SceneFacts) -> str:
    """One sentence in the manner of a prompt: who moves where, over what, and the camera if it moves."""
    who = [_who(o) + _does(o) for o in facts.objects]
    text = _and(who) if who else ""
    if facts.background:
        text = f"{text} over {_a(_and(facts.background))} background" if text else f"{_a(_and(facts.background))} scene"
    move = CAMERA_SENTENCES.get(facts.camera or "", "").removesuffix(".")
    if move and (facts.camera != "static" or not text):
        text = f"{text} while the{move[3:]}" if text else move
    return f"{text[0].upper()}{text[1:]}." if text else full_text(facts)


def sub_actions(facts: SceneFacts, duration_s: float) -> tuple[SubAction, ...]:
    """Every phase of every object with its start and end, in order of time; the camera's move comes last."""
    found = []
    for thing in facts.objects:
        name = name_of(thing)
        for phase in thing.phases:
            start_s = 0.0 if phase.start_s is None else phase.start_s
            end_s = duration_s if phase.end_s is None else phase.end_s
            found.append(SubAction(f"{name} {_phase_words(phase)}", start_s, end_s))
    found.sort(key=lambda action: action.start_s)
    if facts.camera and facts.camera != "static":
        sentence = CAMERA_SENTENCES[facts.camera].removesuffix(".")
        found.append(SubAction(sentence[0].lower() + sentence[1:], 0.0, duration_s))
    return tuple(found)


def spatial_sentences(facts: SceneFacts) -> tuple[str, ...]:
    """How the objects lie to one another at first, without full stops; only shapes, only where they are in different thirds."""
    found = []
    placed = [o for o in facts.objects if o.position and o.shape]  # others may be there at different times
    for number, a in enumerate(placed):
        for b in placed[number + 1 :]:
            (row_a, column_a), (row_b, column_b) = (divmod(POSITIONS.index(o.position or ""), 3) for o in (a, b))
            if name_of(a) == name_of(b):
                continue
            if column_a != column_b:
                side = "left" if column_a < column_b else "right"
                found.append(f"{name_of(a)} is to the {side} of {name_of(b)}")
            if row_a != row_b:
                found.append(f"{name_of(a)} is {'above' if row_a < row_b else 'below'} {name_of(b)}")
    return tuple(found)


def name_of(thing: ObjectFacts) -> str:
    """How later sentences call an object: "the red disc"."""
    words = [w for w in (thing.colour, thing.shape) if w]
    return "the " + " ".join([*words, *([] if thing.shape else ["object"])])


def _object_sentences(thing: ObjectFacts) -> str:
    who = _who(thing)
    who = who[0].upper() + who[1:]
    at = f"{_place(thing.position)} of the picture" if thing.position else ""
    if not thing.phases:
        return f"There is {who[0].lower()}{who[1:]}{' ' + at if at else ''}."
    if len(thing.phases) == 1 and thing.phases[0].motion == "rest":
        return f"{who} {_phase_words(thing.phases[0])}{' ' + at if at else ''}."
    if len(thing.phases) == 1:
        return f"{who} {_phase_words(thing.phases[0])}{', starting ' + at if at else ''}."
    first, *later = (_phase_words(p) for p in thing.phases)
    opening = f"{who} starts {at}. It {first}." if at else f"{who} {first}."
    return " ".join([opening, *(f"Then it {words}." for words in later)])


def _phase_words(phase: Phase) -> str:
    words = MOTION_WORDS[phase.motion]
    if phase.speed_word:
        words += f" {phase.speed_word}"
    if phase.speed is not None:
        words += f" at {round(phase.speed * 100)}% of the short side per second"
    if phase.start_s is not None and phase.end_s is not None:
        words += f" from {phase.start_s:.1f} s to {phase.end_s:.1f} s"
    return words


def _who(thing: ObjectFacts) -> str:
    words = [w for w in (thing.size, thing.colour, thing.shape) if w]
    if not words:
        return "something"
    return _a(" ".join([*words, *([] if thing.shape else ["object"])]))


def _does(thing: ObjectFacts) -> str:
    """The motion in a few words; several phases are told one after another, or as back and forth."""
    if not thing.phases:
        return ""
    if thing.motion:
        return f" {MOTION_WORDS[thing.motion]}"
    return " " + " then ".join(MOTION_WORDS[p.motion] for p in thing.phases)


def _place(position: str) -> str:
    return f"at the {position}" if position in ("left", "right", "top", "bottom") else f"in the {position}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _and(words: tuple[str, ...] | list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
