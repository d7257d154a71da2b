"""Prompts enriched by rule and template (Waver §4.6): what the embedded profile has in place of a large language model.

The report enriches camera, appearance, background and actions. This one finds out which of them, and of the light, a prompt
leaves open, and adds a sentence for each. The sentences hold of any scene, so that they contradict nothing that a rule has
overlooked, and each names its own subject, so that nothing is added a second time. Prompts about moving shapes come out as
captions of the embedded captioner instead (`waver_core.captions.completing`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from waver_core.backends.contracts import Rewriting
from waver_core.captions.completing import completed
from waver_core.errors import ConfigError
from waver_core.isolation import one_by_one
from waver_core.registry import register
from waver_core.taxonomy.grammar import TOKEN, lemma_of, load_words, use_of, verb_forms

LONG_S = 7.5
"""From here on a video is nearer to 10 s than to 5 s, and has room for more action (Waver §4.6)."""

_CAMERA = re.compile(
    r"\b(?:camera\w*|shots?|close-?ups?|close up|angles?|views?|viewed|pan(?:s|ning)?|tilt(?:s|ing)?|zoom\w*|drones?|aerial|"
    r"tracking|doll(?:y|ies)|handheld|hand-held|lens|wide-angle|macro|pov|fpv|perspective|bird's-eye|framed|framing|first-person|"
    r"third-person|selfie|overhead|top-down|seen|from (?:above|below|behind|the side|the front|afar|a distance)|flyover|"
    r"in the foreground|timelapse|time-lapse|fly-through|panorama\w*|isometric|portraits?|eye level|vlog|footage)\b"
)
_LIGHT = re.compile(
    r"\b(?:\w*light\w*|\w*lit|sun\w*|moon\w*|stars?|starry|dark\w*|bright\w*|dim\w*|shad(?:ow|e)\w*|neons?|glow\w*|golden hour|"
    r"blue hour|dawn|dusk|twilight|noon|midday|mid-?night|nights?|nighttime|days?|morning\w*|evenings?|afternoons?|overcast|"
    r"cloud\w*|candle\w*|lamps?|lanterns?|fire\w*|flam(?:e|es|ing)|torch\w*|silhouettes?|silhouetted|fog\w*|mist\w*|haz[ey]|"
    r"storm\w*|thunder\w*|rain\w*|snowstorm|glitter\w*|shimmer\w*|gleam\w*|shin(?:e|es|ing|y)|radiant|aurora|underwater|deep sea|"
    r"space|nightclubs?|concerts?|disco|explo\w+|lava|laser\w*|noir|black[- ]and[- ]white|monochrome)\b"
)
_PLACE = re.compile(
    r"\b(?:background|backdrop|scene(?:ry)?|setting|\w*scape|indoors?|outdoors?|surroundings|environment|horizon|"
    r"(?:beach|sea|ocean|lake|river|harbou?r|shore|coast|island|forest|woods|jungle|park|garden|field|meadow|desert|mountain|"
    r"hill|valley|canyon|cave|city|town|village|street|road|highway|alley|market|bazaar|stadium|room|kitchen|bedroom|"
    r"bathroom|office|classroom|hospital|library|cafe|café|restaurant|factory|battlefield|playground|rooftop|sky)s?|skies|cities|"
    r"(?:at|on|in|into|inside|outside|through|along|across|over|under|beneath|near|beside|behind|above|among|amid|between|"
    r"against|past|around|down|up|off|by|to|towards?|from|within|beyond)(?: [\w-]+){0,4}? (?:waves?|stream|water|pool|pond|pier|"
    r"cliff|grass|lawn|dune|sand|snow|ice|volcano|cloud|space|planet|moon|mars|bridge|square|station|airport|train|bus|car|boat|"
    r"ship|plane|subway|court|pitch|track|gym|rink|stage|theat(?:re|er)|studio|museum|gallery|church|temple|castle|palace|ruin|"
    r"house|home|school|lab|laboratory|shop|store|bar|hotel|warehouse|garage|farm|barn|stable|table|desk|counter|sofa|couch|bed|"
    r"floor|wall|window|windowsill|roof|balcony|porch|yard|courtyard|arena|trail|path|tree|bench|fence|ground|rock)s?)\b"
)
_SEQUENCE = re.compile(
    r"\b(?:then|after\w*|before|first|finally|until|while|begins?|beginning|starts?|starting|ends?|ending|next|slowly|suddenly|as)\b"
)
_STILL = re.compile(
    r"\b(?:still|motionless|frozen|freez\w+|unmoving|stationary|immobile|standstill|no (?:movement|motion|action))\b"
)
_NO_LOOKS = re.compile(
    r"first|last|next|same|other|more|most|many|few|several|all|only|own|such|right|left|upper|lower|one|two|still|"
    r"(?:[\w-]+-)?(?:up|down|in|out|on|off|over)"
)
_FOREIGN = re.compile(  # words that English has too are left out
    r"\b(?:un|une|le|la|les|des|du|et|est|dans|sur|avec|der|das|den|dem|ein|eine|einen|und|ist|im|mit|auf|von|el|los|las|una|del|"
    r"y|en|por|para|il|lo|gli|di|che|per|nel|sulla|um|uma|os|da|na|em|com|een|het|van|og|på|med|och)\b"
)
_ENDED = re.compile(r"[.!?…][\"'”’)\]]*$")

APPEARANCE = "The main subject has clear shapes, natural colours and fine textures."
MOVEMENT = "Small, natural movements keep the scene alive."
MORE_MOVEMENT = "Every movement is shown in full, from its beginning to its end, and leads into the next."
BACKGROUND = "The background suits the scene and has natural depth."
LIGHT = "The lighting is even and suits the mood."
CAMERA = "The camera holds steady and keeps the main subject in view."
CAMERA_IMAGE = "The camera has the main subject in full view."


@register("prompt_rewriter", "template")
class TemplateRewriter:
    """About 1 ms a prompt, the same answer always; a prompt that it has rewritten stays as it is.

    shapes: whether prompts about moving shapes become captions of the attribute captioner; False for a model that has learned
    from other captions, to which a ball is more than a disc. max_chars: what would make the prompt longer is left out. It
    reads English only: a prompt in another language comes back unchanged but for its white space.
    """

    def __init__(self, *, shapes: bool = True, max_chars: int = 2000) -> None:
        if max_chars < 1:
            raise ConfigError(f"max_chars must be at least 1, not {max_chars}")
        self._shapes, self._max_chars = shapes, max_chars
        self.fingerprint = f"template-1 shapes={str(shapes).lower()} max_chars={max_chars}"

    def rewrite(self, requests: Sequence[Rewriting]) -> list[str | Exception]:
        """See `PromptRewriter`."""
        return one_by_one(self._rewritten, requests)

    def _rewritten(self, request: Rewriting) -> str:
        text = " ".join(request.prompt.split())
        body = text
        if request.style_words and request.tagged(text) == text:  # rewritten before, or the user's own words
            body = text[len(request.tagged("").rstrip(".")) :].lstrip(" .,;:!?-")
        caption = completed(body, moving=request.seconds > 0) if self._shapes else None
        if caption is not None and len(request.tagged(caption)) <= self._max_chars:
            return request.tagged(caption)
        if len(request.tagged(text)) >= self._max_chars or not is_english(body):
            return request.tagged(text)
        if text.startswith(("a ", "an ", "the ")):
            text = text[0].upper() + text[1:]
        text = request.tagged(text)
        for sentence in missing(body, request.seconds):
            longer = f"{text if _ENDED.search(text) else text.rstrip(' ,;:-') + '.'} {sentence}"
            if len(longer) <= self._max_chars:
                text = longer
        return text


def missing(text: str, seconds: float) -> list[str]:
    """The sentences for what a prompt leaves open, in the order of training captions; seconds 0 is an image."""
    low = text.lower().replace("’", "'")
    looks, actions = _looks_and_actions(low)
    found = [] if looks else [APPEARANCE]
    if seconds > 0 and not _STILL.search(low):
        found += [] if actions else [MOVEMENT]
        # A single action may be over long before ten seconds are.
        if seconds >= LONG_S and actions < 2 and not _SEQUENCE.search(low):
            found.append(MORE_MOVEMENT)
    found += [] if _PLACE.search(low) else [BACKGROUND]
    found += [] if _LIGHT.search(low) else [LIGHT]
    if not _CAMERA.search(low):
        found.append(CAMERA if seconds > 0 else CAMERA_IMAGE)
    return found


def is_english(text: str) -> bool:
    """Whether the rules can read a text: nine in ten of its letters are ASCII, and no other language's small words prevail."""
    letters = [c for c in text if c.isalpha()]
    if not letters or sum(c.isascii() for c in letters) < 0.9 * len(letters):
        return False
    lists, low = load_words(), text.lower()
    english = sum(word in lists.fillers or word in lists.prepositions or word in lists.be for word in TOKEN.findall(low))
    foreign = len(_FOREIGN.findall(low))
    return foreign < 2 or foreign <= english


def _looks_and_actions(low: str) -> tuple[bool, int]:
    """Whether an adjective says how something looks, and how many verbs say what it does; the camera's do not count."""
    lists, looks, actions = load_words(), False, 0
    words = [*TOKEN.findall(low), ".", "."]
    start = 0
    for at, word in enumerate(words[:-1]):
        if word in ".!?;":
            start = at + 1
            continue
        looks = looks or (not _NO_LOOKS.fullmatch(word) and not word.endswith("ing") and lemma_of(word, "ADJ") is not None)
        lemma = lemma_of(word, "VERB")
        if lemma is None or lemma in ("be", "have", "do"):
            continue
        filmed = word in lists.camera_verbs and not lists.camera.isdisjoint(words[start:at])
        tags = verb_forms(lemma).get(word)
        if tags and not filmed and use_of(words, at, start, tags):
            actions += 1
    return looks, actions
