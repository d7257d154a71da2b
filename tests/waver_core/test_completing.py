"""Prompts about shapes become exactly the captions that the embedded model was trained on, and captions stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waver_core.backends.embedded.hashed_text import words_of
from waver_core.captions.completing import completed
from waver_core.captions.facts import COLOURS, SHAPES, SIZES, ObjectFacts, Phase, SceneFacts
from waver_core.captions.parsing import parse
from waver_core.captions.sentences import MOTION_WORDS, full_text, short_text
from waver_core.synthetic import TRAINING_COLOURS

ENCODER_TOKENS = 16
GROUND_COLOURS = ("white", "beige", "grey")


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("red disc moving left", "A medium-sized red disc moves to the left over a white background."),
        ("a blue circle going up", "A medium-sized blue disc moves up over a white background."),
        ("RED DISC MOVING LEFT!", "A medium-sized red disc moves to the left over a white background."),
        ("A green square moves down on beige", "A medium-sized green square moves down over a beige background."),
        ("big cyan dot, white background", "A large cyan disc over a white background."),
        ("tiny pink dot drifts right across a blue background", "A small pink disc moves to the right over a blue background."),
        ("A red disc moves from left to right", "A medium-sized red disc moves to the right over a white background."),
        ("a magenta ball falls", "A medium-sized magenta disc moves down over a white background."),
        ("a yellow star bounces back and forth", "A medium-sized yellow star moves back and forth over a white background."),
        ("A red disc doesn't move.", "A medium-sized red disc stays still over a white background."),
        ("a white square", "A medium-sized white square over a black background."),
        ("a video of a red disc", "A medium-sized red disc over a white background."),
        ("a disc moves", "A medium-sized red disc moves to the right over a white background."),
        ("a blue square moves fast", "A medium-sized blue square moves to the right quickly. The background is white."),
        (
            "a big cyan triangle stays still on a black background while the camera pans right",
            "A large cyan triangle stays still over a black background while the camera pans to the right.",
        ),
        (
            "a red disc moves left and a blue square moves up",
            "A medium-sized red disc moves to the left and a medium-sized blue square moves up over a white background.",
        ),
        (
            "A red disc moves left, then right, in dim light",
            "A medium-sized red disc moves to the left. Then it moves to the right. The background is white. The light is dim.",
        ),
        (
            "a red ring in the upper left corner moves slowly up",
            "A medium-sized red ring moves up slowly, starting in the upper left of the picture. The background is white.",
        ),
    ],
)
def test_what_is_said_is_kept_and_what_is_open_filled_in(prompt: str, caption: str) -> None:
    assert completed(prompt) == caption
    assert completed(caption) == caption


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red ball rolls down a hill",
        "no red disc",
        "a red disc without a background",
        "red discs",
        "five red discs",
        "a red thing moves left",
        "a red disc is to the left of a blue square",
        "The disc is blue",
        "a dark red disc",
        "a red disc 🙂",
        "a red disc, then a blue one",
        "a red disc moves to a blue square that glows",
        "красный disc",
        "a white background",
        "red disc " * 200,
    ],
)
def test_what_is_not_wholly_understood_is_left_alone(prompt: str) -> None:
    assert completed(prompt) is None


def test_a_still_picture_gets_no_direction() -> None:
    assert completed("a red disc moves", moving=False) is None
    assert completed("red disc", moving=False) == "A medium-sized red disc over a white background."


@given(st.sampled_from(TRAINING_COLOURS), st.sampled_from(["disc", "square"]), st.sampled_from(list(MOTION_WORDS)[:4]), st.data())
def test_every_prompt_of_the_training_world_is_a_caption_that_the_encoder_holds(
    colour: str, shape: str, direction: str, data: st.DataObject
) -> None:
    size, ground = data.draw(st.sampled_from(["", *SIZES])), data.draw(st.sampled_from(["", *GROUND_COLOURS]))
    verb = data.draw(st.sampled_from(["moving", "moves", "going", "drifts", "slides"]))
    prompt = f"{data.draw(st.sampled_from(['', 'a ', 'A ']))}{size} {colour} {shape} {verb} {direction}"
    prompt += f" {data.draw(st.sampled_from(['over', 'on', 'against']))} a {ground} background" if ground else ""
    caption = completed(prompt)
    assert caption == (
        f"A {size or 'medium-sized'} {colour} {shape} {MOTION_WORDS[direction]} over a {ground or 'white'} background."
    )
    assert len(words_of(caption)) <= ENCODER_TOKENS


@st.composite
def scenes(draw: st.DrawFn) -> SceneFacts:
    """Facts as the attribute captioner states them, some of them open."""

    def maybe(values: tuple[str, ...]) -> str | None:
        return draw(st.sampled_from((None, *values)))

    colours = draw(st.lists(st.sampled_from(COLOURS), min_size=1, max_size=3, unique=True))
    phases = st.sampled_from([(), *((Phase(m),) for m in MOTION_WORDS), (Phase("left", "slowly", 0.1, 0.0, 1.5),)])
    objects = [
        ObjectFacts(c, draw(st.sampled_from(SHAPES)), maybe(SIZES), maybe(("top", "centre", "lower left")), draw(phases))
        for c in colours
    ]
    ground = tuple(draw(st.lists(st.sampled_from([c for c in COLOURS if c not in colours]), max_size=2, unique=True)))
    return SceneFacts(ground, maybe(("bright", "dark")), maybe(("static", "pan_left", "zoom_in")), tuple(objects))


WRITERS: dict[str, Callable[[SceneFacts], str]] = {"short": short_text, "full": full_text}


@given(scenes(), st.sampled_from(list(WRITERS)))
def test_captions_keep_their_facts_and_complete_ones_their_every_letter(facts: SceneFacts, form: str) -> None:
    caption = WRITERS[form](facts)
    found = completed(caption)
    if found is None:
        return
    before, after = parse(caption), parse(found)
    complete = bool(before.background) and all(thing.size for thing in before.objects)
    if complete and caption == short_text(before):
        assert found == caption
    assert completed(found) == found
    assert (before.light, before.camera, before.texts) == (after.light, after.camera, after.texts)
    assert after.background == (before.background or after.background) != ()
    for old, new in zip(before.objects, after.objects, strict=True):
        assert (old.colour, old.shape, old.position, old.phases) == (new.colour, new.shape, new.position, new.phases)
        assert new.size == (old.size or "medium-sized")
    assert not {thing.colour for thing in after.objects} & set(after.background)


@given(scenes())
def test_short_captions_of_shapes_are_never_refused(facts: SceneFacts) -> None:
    things = tuple(ObjectFacts(o.colour, o.shape, o.size, None, tuple(Phase(p.motion) for p in o.phases)) for o in facts.objects)
    assert completed(short_text(SceneFacts(facts.background, objects=things))) is not None
