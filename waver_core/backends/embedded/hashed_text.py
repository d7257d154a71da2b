"""Text vectors without weights: hashed words and hashed pairs of words, in place of T5 and Qwen2.5 (Waver §2).

A word is the sum of fixed pseudo-random sign vectors, one of the word itself and one of each of its character n-grams (as
in fastText: Bojanowski et al., 2017), so that words alike in spelling are alike as vectors and others nearly orthogonal. A
pair is the product, entry by entry, of a word's vector with that of the word before, turned by one entry so that the order
counts ("red disc" is not "disc red"): it tells which colour goes with which shape, which a single word cannot. Neither
knows what a word means. The vectors come from a hash, the same on every machine and in every version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from waver_core.errors import ConfigError
from waver_core.registry import register

BEGIN = "\x02"
"""Stands before every text, so that the empty one has a vector too."""
_TOKENS = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+(?:['’][^\W\d_]+)*|[.,]")
_NGRAM_LENGTHS = (3, 4, 5)


class HashedText:
    """What both encoders share. Entries have a mean square of exactly 1 over each vector.

    position: how much of a vector (as a share of its norm, below 1) is a sinusoid of its place in the text; attention sees
    a set, and without it "a left of b" would be "b left of a".
    """

    name = ""
    vector: Callable[[str, str, int], np.ndarray]
    """The vector of a word, given (the word before, the word, dim)."""

    def __init__(self, dim: int = 64, max_tokens: int = 96, position: float = 0.25) -> None:
        if dim < 8 or dim % 8:
            raise ConfigError(f"dim must be a multiple of 8, not {dim}")
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
        if not 0 <= position < 1:
            raise ConfigError(f"position must be from 0 up to, but not including, 1, not {position}")
        self.dim, self.max_tokens = dim, max_tokens
        self.fingerprint = f"{self.name}-1 dim={dim} max_tokens={max_tokens} position={position:g}"
        self._content = float(np.sqrt(1 - position**2))
        self._places = np.float32(position) * _sinusoids(max_tokens, dim)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder`: float32 [1 + words, dim] per text, `max_tokens` at most; upper case does not count."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        words = words_of(text)[: self.max_tokens]
        vectors = np.stack([self.vector(before, word, self.dim) for before, word in zip(["", *words], words)])
        mixed = self._content * vectors + self._places[: len(words)]
        # The two parts are not quite orthogonal: brought back to the norm that every vector has.
        return mixed / np.sqrt(np.mean(np.square(mixed), axis=1, keepdims=True))


def words_of(text: str) -> list[str]:
    """The begin token, then words, numbers, full stops and commas, in lower case."""
    return [BEGIN, *_TOKENS.findall(text.lower())]


@lru_cache(maxsize=65536)
def _word_vector(word: str, dim: int) -> np.ndarray:
    """float32 [dim] of mean square 1: half from the word, half from its n-grams."""
    vector = _signs(f"word {word}", dim)
    framed = f"<{word}>"
    grams = sorted({framed[k : k + n] for n in _NGRAM_LENGTHS for k in range(len(framed) - n + 1)} - {framed})
    if grams:
        vector = vector + np.sum([_signs(f"gram {gram}", dim) for gram in grams], axis=0) / np.sqrt(len(grams))
    return _normalised(vector)


@lru_cache(maxsize=65536)
def _pair_vector(before: str, word: str, dim: int) -> np.ndarray:
    """float32 [dim] of mean square 1."""
    return _normalised(np.roll(_word_vector(before, dim), 1) * _word_vector(word, dim))


def _signs(feature: str, dim: int) -> np.ndarray:
    """A vector of -1 and 1 that depends on the feature alone."""
    digest = hashlib.shake_128(feature.encode()).digest(dim // 8)
    return 2.0 * np.unpackbits(np.frombuffer(digest, np.uint8)) - 1.0


def _normalised(vector: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.mean(np.square(vector)))
    vector = (vector / size if size > 0 else np.ones_like(vector)).astype(np.float32)
    vector.flags.writeable = False  # the cache hands the same array to everyone
    return vector


def _sinusoids(length: int, dim: int) -> np.ndarray:
    """float32 [length, dim] of mean square 1: sines and cosines of periods from 2 pi to 2 pi * 100 places."""
    angles = np.arange(length)[:, None] * 100.0 ** -np.linspace(0, 1, dim // 2)
    return (np.sqrt(2) * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).astype(np.float32)


@register("text_encoder", "hashed_words")
class HashedWords(HashedText):
    """One vector per word. Options: see `HashedText`."""

    name = "hashed_words"
    vector = staticmethod(lambda before, word, dim: _word_vector(word, dim))


@register("text_encoder", "hashed_pairs")
class HashedPairs(HashedText):
    """One vector per word and the word before it. Options: see `HashedText`."""

    name = "hashed_pairs"
    vector = staticmethod(_pair_vector)
