"""The presets hold what the report says they hold, and impossible numbers are refused with what to do."""

from __future__ import annotations

import pytest
import torch

from waver_core.dit import PRESETS, DiTConfig, WaverDiT, preset
from waver_core.errors import ConfigError


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in WaverDiT(PRESETS[name]).parameters())


def test_table_1_makes_about_12_billion_parameters() -> None:
    config = PRESETS["waver_12b"]
    assert (config.dual_blocks, config.single_blocks, config.heads, config.head_dim) == (16, 40, 24, 128)
    assert (config.in_channels, config.in_features, config.out_features) == (36, 144, 64)
    assert 12.2e9 < parameters("waver_12b") < 12.5e9


@pytest.mark.parametrize("name", ["waver_12b", "tiny"])
def test_pure_streams_have_as_many_parameters_as_the_hybrid(name: str) -> None:
    hybrid = parameters(name)
    assert parameters(f"{name}_dual") == parameters(f"{name}_single") == hybrid


@pytest.mark.parametrize(("name", "low", "high"), [("waver_1b", 0.7e9, 2e9), ("waver_200m", 1.4e8, 2.6e8), ("tiny", 1e6, 4e6)])
def test_smaller_presets_are_what_their_names_say(name: str, low: float, high: float) -> None:
    assert low < parameters(name) < high


def test_a_heads_dimensions_are_shared_out_to_three_axes() -> None:
    assert PRESETS["waver_12b"].rope_dims == (44, 42, 42)
    for head_dim in range(8, 130, 2):
        dims = DiTConfig(1, 0, 1, head_dim).rope_dims
        assert sum(dims) == head_dim and all(d >= 2 and d % 2 == 0 for d in dims)


def test_the_refiner_attends_fully_in_the_first_and_last_eight_blocks_and_else_in_turn() -> None:
    config = preset("waver_12b", windowed=True)
    kinds = [config.attention_kind(i) for i in range(config.blocks)]
    assert kinds[:8] == kinds[-8:] == ["full"] * 8
    assert kinds[8:-8] == ["space", "time"] * 20


def test_the_base_model_and_a_shallow_refiner_attend_fully() -> None:
    assert {PRESETS["waver_12b"].attention_kind(i) for i in range(56)} == {"full"}
    shallow = preset("tiny", windowed=True, full_blocks=3)
    assert {shallow.attention_kind(i) for i in range(shallow.blocks)} == {"full"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dual_blocks": 0, "single_blocks": 0}, "needs blocks"),
        ({"dual_blocks": -1, "single_blocks": 4}, "needs blocks"),
        ({"heads": 0}, "at least one head"),
        ({"head_dim": 6}, "even size of 8 or more"),
        ({"head_dim": 33}, "even size of 8 or more"),
        ({"text_dims": ()}, "at least one text encoder"),
        ({"max_grid": (16, 32)}, "three numbers"),
        ({"max_grid": (16, 32, 0)}, "three numbers"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        preset("tiny", **fields)


def test_misspelt_presets_and_fields_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'waver_12b'"):
        preset("waver12b")
    with pytest.raises(ConfigError, match="did you mean 'head_dim'"):
        preset("tiny", headdim=3)


def test_a_config_goes_through_plain_values_and_back() -> None:
    config = preset("tiny", windowed=True, text_dims=[4, 8])
    plain = config.to_dict()
    assert plain["text_dims"] == [4, 8] and plain["max_grid"] == [16, 32, 32]
    assert DiTConfig(**plain) == config and hash(DiTConfig(**plain)) == hash(config)
