"""The template adds what a prompt leaves open, loses nothing of it, and adds nothing a second time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waver_core.backends.contracts import PromptRewriter, Rewriting
from waver_core.backends.embedded import template_rewriter as template
from waver_core.backends.embedded.template_rewriter import TemplateRewriter, is_english, missing
from waver_core.captions.completing import completed
from waver_core.errors import ConfigError
from waver_core.registry import create

REWRITER = TemplateRewriter()
STYLES = ("", "2D anime style", "Realistic style.")
WORDS = re.findall(
    r"\S+",
    "a an the cat dog woman potter runs jumps sleeps red fluffy old beach city street in on over with and then night sunny "
    "camera close-up drone train lake still slowly smiling 3 café naïve",
)
english = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
endings = st.sampled_from(["", ".", "!", ",", " -", "?)", '"'])
seconds_of = st.sampled_from([0.0, 2.0, 5.0, 7.5, 10.0])


def rewritten(prompt: str, seconds: float = 5.0, style: str = "", rewriter: TemplateRewriter = REWRITER) -> str:
    (found,) = rewriter.rewrite([Rewriting(prompt, seconds, style)])
    assert isinstance(found, str)
    return found


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def test_it_keeps_the_contract() -> None:
    built = create("prompt_rewriter", "template", max_chars=300, shapes=False)
    assert isinstance(built, PromptRewriter)
    assert built.fingerprint == "template-1 shapes=false max_chars=300" != REWRITER.fingerprint
    assert REWRITER.rewrite([]) == []
    requests = [Rewriting("a cat", 5), Rewriting("red disc", 5), Rewriting("", 5), Rewriting("a cat", 0)]
    assert REWRITER.rewrite(requests) == [rewritten(r.prompt, r.seconds) for r in requests]
    with pytest.raises(ConfigError, match="max_chars must be at least 1, not 0"):
        TemplateRewriter(max_chars=0)


@pytest.mark.parametrize(
    ("prompt", "added"),
    [
        ("a cat", [template.APPEARANCE, template.MOVEMENT, template.BACKGROUND, template.LIGHT, template.CAMERA]),
        ("a fluffy cat", [template.MOVEMENT, template.BACKGROUND, template.LIGHT, template.CAMERA]),
        ("a cat runs", [template.APPEARANCE, template.BACKGROUND, template.LIGHT, template.CAMERA]),
        ("a cat on the kitchen floor", [template.APPEARANCE, template.MOVEMENT, template.LIGHT, template.CAMERA]),
        ("a cat at night", [template.APPEARANCE, template.MOVEMENT, template.BACKGROUND, template.CAMERA]),
        ("close-up of a cat", [template.APPEARANCE, template.MOVEMENT, template.BACKGROUND, template.LIGHT]),
        ("the camera follows a cat", [template.APPEARANCE, template.MOVEMENT, template.BACKGROUND, template.LIGHT]),
        ("time stands still in the old city at night", [template.CAMERA]),
        ("a fluffy white cat sleeps on a sofa in warm sunlight, seen from above", []),
    ],
)
def test_it_adds_a_sentence_for_whatever_is_open(prompt: str, added: list[str]) -> None:
    assert missing(prompt, 5) == added
    assert rewritten(prompt).casefold() == " ".join([f"{prompt}." if added else prompt, *added]).casefold()


def test_ten_seconds_get_more_action_where_there_is_little_and_images_get_none() -> None:
    assert template.MORE_MOVEMENT in missing("a cat jumps", 10)
    assert template.MORE_MOVEMENT not in missing("a cat jumps", 5)
    assert template.MORE_MOVEMENT not in missing("a cat jumps, then it runs away", 10)
    assert template.MORE_MOVEMENT not in missing("a motionless cat", 10)
    assert len(rewritten("a cat jumps", 10)) > len(rewritten("a cat jumps", 5))
    assert not {template.MOVEMENT, template.MORE_MOVEMENT, template.CAMERA} & set(missing("a cat", 0))


def test_a_prompt_about_shapes_becomes_a_caption_unless_that_is_off() -> None:
    assert rewritten("red disc moving left") == "A medium-sized red disc moves to the left over a white background."
    complete = "A large cyan square moves up over a beige background."
    assert rewritten(complete) == complete
    assert rewritten("red disc", 5, "Realistic style") == "Realistic style. A medium-sized red disc over a white background."
    plain = rewritten("red disc moving left", rewriter=TemplateRewriter(shapes=False))
    assert plain == " ".join(["red disc moving left.", template.BACKGROUND, template.LIGHT, template.CAMERA])
    # where the caption is longer than allowed, the prompt stays
    assert rewritten("red disc moving left", rewriter=TemplateRewriter(max_chars=30)) == "red disc moving left"


@pytest.mark.parametrize(
    "prompt",
    ["一只猫在海滩上奔跑", "un chien court sur la plage", "Ein Hund läuft auf dem Strand und bellt", "кошка", "???", "", "🙂"],
)
def test_what_it_cannot_read_it_leaves_alone(prompt: str) -> None:
    assert not is_english(prompt)
    assert rewritten(prompt, 10) == prompt
    assert rewritten(prompt, 10, "2D anime style") == f"2D anime style. {prompt}".rstrip()


def test_a_few_names_and_accents_are_still_english() -> None:
    for prompt in ("Los Angeles", "a naïve painter in a café", "a taco truck in El Paso"):
        assert is_english(prompt)


def test_style_words_stand_first_once_and_say_nothing_of_the_scene() -> None:
    once = rewritten("a cat", 5, "Realistic style")
    assert once == f"Realistic style. {rewritten('a cat')}"
    assert rewritten("realistic style, a cat", 5, "Realistic style") == once.replace("Realistic style. A", "realistic style, a")
    assert rewritten("Realistic styles", 5, "Realistic style").startswith("Realistic style. Realistic styles.")


@given(english, endings, seconds_of, st.sampled_from(STYLES))
def test_no_word_is_lost_and_nothing_is_added_twice(prompt: str, ending: str, seconds: float, style: str) -> None:
    prompt += ending
    found = rewritten(prompt, seconds, style)
    if completed(prompt, moving=seconds > 0) is None:
        head = words(style) + words(prompt)
        assert words(found)[: len(head)] == head
    assert found.startswith(style)
    assert rewritten(found, seconds, style) == found
    assert rewritten(prompt, seconds, style) == found
    if is_english(prompt):
        assert missing(found.removeprefix(style), seconds) == []


@given(st.text(alphabet=st.characters(), max_size=80), seconds_of, st.sampled_from(STYLES), st.integers(1, 400))
def test_any_text_gives_a_text_no_longer_than_the_cap(prompt: str, seconds: float, style: str, cap: int) -> None:
    rewriter = TemplateRewriter(max_chars=cap)
    found = rewritten(prompt, seconds, style, rewriter)
    as_it_was = Rewriting(" ".join(prompt.split()), seconds, style)
    assert len(found) <= max(cap, len(as_it_was.tagged(as_it_was.prompt)))
    assert rewritten(found, seconds, style, rewriter) == found
    if completed(as_it_was.prompt, moving=seconds > 0) is None:
        assert set(words(prompt)) <= set(words(found))


def test_a_hostile_prompt_is_read_in_time() -> None:
    patient = TemplateRewriter(max_chars=10_000)
    for prompt in ("in " * 1600, "in " + "a" * 4900, "a and the camera slowly " * 200, "-" * 4999 + "a", "in a-a-a-" * 550):
        assert rewritten(prompt, 10, "", patient)  # the limit of every test catches what does not come back
