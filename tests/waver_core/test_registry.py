"""The registry: what the scan finds, and how wrong names and options are refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from waver_core import registry
from waver_core.backends import contracts
from waver_core.errors import ConfigError
from waver_core.registry import backend_class, backends, create, register

EMBEDDED = {
    "frame_embedder": ("color_layout", contracts.FrameEmbedder),
    "flow_estimator": ("dis", contracts.FlowEstimator),
    "foreground_segmenter": ("residual", contracts.ForegroundSegmenter),
    "text_detector": ("rapidocr", contracts.TextDetector),
    "watermark_scorer": ("static_overlay", contracts.WatermarkScorer),
    "aesthetic_scorer": ("photographic", contracts.AestheticScorer),
}


@pytest.fixture
def scratch() -> Iterator[None]:
    """Backends registered by a test are gone after it."""
    backends("frame_embedder")
    before = dict(registry._BACKENDS)
    yield
    registry._BACKENDS.clear()
    registry._BACKENDS.update(before)


@pytest.mark.parametrize("capability", EMBEDDED)
def test_scanning_finds_the_embedded_backend_of_every_capability(capability: str) -> None:
    name, protocol = EMBEDDED[capability]
    assert name in backends(capability)
    backend = create(capability, name)
    assert isinstance(backend, protocol)
    assert backend.fingerprint.startswith(name)


def test_unknown_backend_suggests_the_nearest_of_its_capability() -> None:
    with pytest.raises(ConfigError) as caught:
        backend_class("frame_embedder", "colour_layout")
    assert str(caught.value) == "no backend 'colour_layout' for frame_embedder: did you mean 'color_layout'?"


def test_unknown_capability_says_that_it_has_nothing() -> None:
    assert backends("telepathy") == []
    with pytest.raises(ConfigError, match="no backend 'x' for telepathy: nothing of that kind is known"):
        create("telepathy", "x")


def test_options_that_a_backend_does_not_take_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"backend foreground_segmenter/residual: .*'min_residual'"):
        create("foreground_segmenter", "residual", min_residual=1)
    with pytest.raises(ConfigError, match="dis flow has no preset 'fst': did you mean 'fast'"):
        create("flow_estimator", "dis", preset="fst")


def test_options_change_the_fingerprint() -> None:
    assert create("flow_estimator", "dis", preset="fast").fingerprint != create("flow_estimator", "dis").fingerprint


def test_two_backends_of_one_name_are_refused(scratch: None) -> None:
    class First:
        pass

    class Second:
        pass

    register("frame_embedder", "twin")(First)
    with pytest.raises(ConfigError, match="two backends are called frame_embedder/twin"):
        register("frame_embedder", "twin")(Second)
    assert backend_class("frame_embedder", "twin") is First


def test_two_modules_with_a_class_of_the_same_name_are_refused_as_well(scratch: None) -> None:
    one, other = (type("Scorer", (), {"__module__": module}) for module in ("here", "there"))
    register("frame_embedder", "twin")(one)
    with pytest.raises(ConfigError, match="here and there"):
        register("frame_embedder", "twin")(other)


def test_the_same_class_may_register_again_and_under_other_capabilities(scratch: None) -> None:
    class Both:
        pass

    register("frame_embedder", "both")(Both)
    register("frame_embedder", "both")(Both)
    register("text_detector", "both")(Both)
    assert backend_class("frame_embedder", "both") is backend_class("text_detector", "both") is Both
