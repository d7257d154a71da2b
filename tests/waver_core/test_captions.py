"""Captions are facts: what is written is read back, prompts are understood, paths, colours and outlines get their names."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waver_core.captions.colours import main_colours, name_of_lab, to_lab
from waver_core.captions.comparing import compare, share_agreeing
from waver_core.captions.facts import (
    CAMERAS,
    COLOURS,
    LIGHTS,
    MOTIONS,
    POSITIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    ObjectFacts,
    Phase,
    SceneFacts,
    position_word,
)
from waver_core.captions.parsing import parse
from waver_core.captions.paths import direction_of, phases_of
from waver_core.captions.reading import makes_sense
from waver_core.captions.sentences import full_text, short_text, spatial_sentences, sub_actions
from waver_core.captions.silhouettes import normalised, overlaps
from waver_core.synthetic import COLOURS as RENDERED
from waver_core.synthetic import DIRECTIONS, SHAPE_KINDS
from waver_core.synthetic.sprites import outline

DISC = ObjectFacts("red", "disc", "small", "left", (Phase("right", "steadily", 0.25),))
SCENE = SceneFacts(("green", "grey"), "bright", "pan_left", (DISC, ObjectFacts("blue", "square", None, "upper right")), ("SALE",))


def maybe(values: tuple[str, ...]) -> st.SearchStrategy[str | None]:
    return st.none() | st.sampled_from(values)


@st.composite
def phases(draw: st.DrawFn) -> tuple[Phase, ...]:
    found = []
    for motion in draw(st.lists(st.sampled_from(MOTIONS), max_size=3)):
        moving = motion != "rest"
        word = draw(maybe(SPEEDS)) if moving else None
        speed = draw(st.none() | st.integers(1, 300)) if moving else None
        start = draw(st.none() | st.integers(0, 99))
        end = None if start is None else (start + draw(st.integers(1, 99))) / 10
        found.append(Phase(motion, word, None if speed is None else speed / 100, None if start is None else start / 10, end))
    return tuple(found)


OBJECTS = st.builds(ObjectFacts, maybe(COLOURS), maybe(SHAPES), maybe(SIZES), maybe(POSITIONS), phases())
TEXTS = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Zs"), exclude_characters='"'), min_size=1, max_size=12)
SCENES = st.builds(
    SceneFacts,
    st.lists(st.sampled_from(COLOURS), max_size=3, unique=True).map(tuple),
    maybe(LIGHTS),
    maybe(CAMERAS),
    st.lists(OBJECTS, max_size=3).map(tuple),
    st.lists(TEXTS, max_size=2).map(tuple),
)


@given(SCENES)
@settings(max_examples=300, deadline=None)
def test_what_is_written_is_read_back(facts: SceneFacts) -> None:
    assert parse(full_text(facts)) == facts


@given(SCENES)
@settings(max_examples=200, deadline=None)
def test_short_captions_say_the_same_in_fewer_words(facts: SceneFacts) -> None:
    found = parse(short_text(facts))
    if facts.background or facts.objects:
        assert found.background == facts.background
        assert [(o.size, o.colour, o.shape) for o in found.objects] == [(o.size, o.colour, o.shape) for o in facts.objects]
        assert [o.motion for o in found.objects] == [o.motion for o in facts.objects]
    assert found.camera == (facts.camera if facts.camera != "static" or not (facts.background or facts.objects) else None)


def test_the_grammar() -> None:
    assert full_text(SCENE) == (
        "A small red disc moves to the right steadily at 25% of the short side per second, starting at the left of the "
        "picture. There is a blue square in the upper right of the picture. The background is green and grey. The light is "
        "bright. The camera pans to the left. The red disc is to the left of the blue square. The red disc is below the blue "
        'square. The text reads "SALE".'
    )
    assert short_text(SCENE) == (
        "A small red disc moves to the right and a blue square over a green and grey background "
        "while the camera pans to the left."
    )
    assert spatial_sentences(SCENE) == ("the red disc is to the left of the blue square", "the red disc is below the blue square")
    assert full_text(SceneFacts()) and parse(full_text(SceneFacts())) == SceneFacts()


def test_sub_actions_have_spans() -> None:
    there, back = Phase("right", "steadily", 0.3, 0.0, 1.6), Phase("left", "slowly", 0.1, 1.6, 3.0)
    facts = SceneFacts(camera="zoom_in", objects=(ObjectFacts("red", "disc", phases=(there, back)), ObjectFacts(None, None)))
    found = sub_actions(facts, 3.0)
    assert [(a.start_s, a.end_s) for a in found] == [(0.0, 1.6), (1.6, 3.0), (0.0, 3.0)]
    assert found[1].text.startswith("the red disc moves to the left slowly")
    assert found[2].text == "the camera zooms in"
    assert facts.objects[0].motion == "back_and_forth"
    assert "moves back and forth" in short_text(facts)


@pytest.mark.parametrize(
    ("prompt", "objects", "background", "camera"),
    [
        (
            "A red disc moves to the left over a green background while the camera pans right",
            [("red", "disc", "left")],
            ("green",),
            "pan_right",
        ),
        (
            "a big blue square drifts slowly upwards, and a yellow star stays still in the upper left corner. static camera",
            [("blue", "square", "up"), ("yellow", "star", "rest")],
            (),
            "static",
        ),
        (
            "Two red circles bounce on a white backdrop; the camera zooms in",
            [("red", "disc", "back_and_forth")] * 2,
            ("white",),
            "zoom_in",
        ),
        (
            "A green triangle flies from left to right against a dark blue background, quickly",
            [("green", "triangle", "right")],
            ("blue",),
            None,
        ),
        (
            "The camera tilts down over a small purple ring which moves diagonally down and to the right",
            [("purple", "ring", "down_right")],
            (),
            "tilt_down",
        ),
        ("On a gray background a shiny white cross is falling.", [("white", "cross", "down")], ("grey",), None),
        ("A magenta hexagon crosses the picture from right to left", [("magenta", "hexagon", "left")], (), None),
        ("There is an orange diamond. It rises while the camera shakes.", [("orange", "diamond", "up")], (), "shake"),
        ("A red ball moves right. The ball then moves left.", [("red", "disc", "back_and_forth")], (), None),
        ("A cat sleeps on the sofa, film grain, 35 mm", [], (), None),
    ],
)
def test_prompts_of_users(
    prompt: str, objects: list[tuple[str, str, str]], background: tuple[str, ...], camera: str | None
) -> None:
    found = parse(prompt)
    assert [(o.colour, o.shape, o.motion) for o in found.objects] == objects
    assert (found.background, found.camera) == (background, camera)


def test_comparison_pairs_objects_and_judges_what_the_prompt_states() -> None:
    prompt = parse("A blue square stays still and a red disc moves to the left over a grey background while the camera pans left")
    judged = {a.fact: a for a in compare(prompt, SCENE)}
    assert judged["colour"].agrees and judged["shape"].agrees and judged["colour_2"].agrees
    assert not judged["direction"].agrees and judged["direction"].measured is None
    assert (judged["direction_2"].wanted, judged["direction_2"].measured, judged["direction_2"].agrees) == (
        "left",
        "right",
        False,
    )
    assert judged["background"].agrees and judged["camera"].agrees and judged["objects"].agrees
    assert "light" not in judged and "text" not in judged
    assert share_agreeing(list(judged.values())) == pytest.approx(7 / 9)
    assert share_agreeing(compare(SceneFacts(), SCENE)) is None


@given(SCENES)
@settings(max_examples=100, deadline=None)
def test_everything_agrees_with_itself(facts: SceneFacts) -> None:
    disagreeing = [a.fact for a in compare(facts, facts) if not a.agrees]
    assert all(fact.startswith("speed") for fact in disagreeing)  # resting phases have no speed to compare


@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "rest"])
def test_straight_paths(direction: str) -> None:
    times = np.arange(12) / 6
    path = times[:, None] * DIRECTIONS[direction] * 0.2 + np.random.default_rng(0).normal(0, 0.002, (12, 2))
    (phase,) = phases_of(times, path, 2.0)
    assert (phase.motion, phase.speed_word, phase.start_s) == (direction, "steadily", None)
    assert phase.speed == pytest.approx(0.2, abs=0.011)
    assert direction_of(*DIRECTIONS[direction]) == direction


def test_paths_with_turns_and_rests() -> None:
    times = np.arange(24) / 6
    x = np.interp(times, [0, 1.5, 2.5, 4], [0, 0.5, 0.5, 0.1])
    found = phases_of(times, np.stack([x, np.zeros(24)], axis=1), 4.0)
    assert [p.motion for p in found] == ["right", "rest", "left"]
    assert [p.start_s for p in found] == pytest.approx([0.0, 1.5, 2.5], abs=0.25)
    assert found[-1].end_s == 4.0
    still = phases_of(times, np.random.default_rng(1).normal(0, 0.003, (24, 2)), 4.0)
    assert still == (Phase("rest"),)
    assert phases_of(times[:1], np.zeros((1, 2)), 1.0) == ()


def test_colours_have_their_everyday_names() -> None:
    assert {c: name_of_lab(to_lab(np.array([v], np.uint8))[0]) for c, v in RENDERED.items()} == {c: c for c in RENDERED}
    muted = {"grey": (128, 134, 142), "brown": (122, 76, 60), "green": (84, 116, 80), "blue": (98, 140, 160)}
    muted |= {"beige": (220, 188, 146), "pink": (222, 170, 180), "brown ": (96, 66, 54)}
    assert {c: name_of_lab(to_lab(np.array([v], np.uint8))[0]) for c, v in muted.items()} == {c: c.strip() for c in muted}
    halves = np.array([[222, 45, 48]] * 60 + [[128, 128, 128]] * 40, np.uint8)
    assert main_colours(halves) == ("red", "grey")
    assert main_colours(np.zeros((0, 3), np.uint8)) == ()


@pytest.mark.parametrize("kind", SHAPE_KINDS)
def test_outlines_are_told_apart(kind: str) -> None:
    mask = np.zeros((120, 120), np.uint8)
    cv2.fillPoly(mask, [np.round(outline(kind) * 60 + 57).astype(np.int32)], 1)
    if kind == "ring":
        cv2.circle(mask, (57, 57), 16, 0, -1)
    moments = cv2.moments(mask, binaryImage=True)
    scores = overlaps(normalised(mask, (moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]), moments["m00"]))
    best, second, *_ = sorted(scores, key=lambda s: -scores[s])
    assert best == kind and scores[best] > 0.9 and scores[best] - scores[second] > 0.01


@pytest.mark.parametrize(
    ("text", "sense"),
    [
        ("SALE", True),
        ("Part 2", True),
        ("www.example.com", True),
        ("--|--", False),
        ("oo", False),
        ("IIII", False),
        ("日本語字幕", False),
    ],
)
def test_patterns_are_not_taken_for_text(text: str, sense: bool) -> None:
    assert makes_sense(text) is sense


def test_positions() -> None:
    assert [position_word(x, y) for x, y in ((0.1, 0.1), (0.5, 0.5), (0.99, 1.0))] == ["upper left", "centre", "lower right"]
