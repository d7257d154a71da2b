"""Progress never falls, ends below one, and is weighted by what stages take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.generate_request import GenerateRequest
from serving.plan import facts, plan
from serving.progress import STAGES, Progress, Rates, work
from tests.serving.exports import write_settings
from waver_core.dit import PRESETS

SECONDS = st.dictionaries(st.sampled_from(STAGES), st.floats(0, 1000), min_size=1)


@given(SECONDS, st.integers(1, 50))
def test_it_never_falls_and_stays_below_one(expected: dict[str, float], steps: int) -> None:
    expected = {stage: expected[stage] for stage in STAGES if stage in expected}
    progress = Progress(expected)
    seen = [progress.at(stage, done, steps) for stage in expected for done in range(steps + 1)]
    assert seen == sorted(seen) and seen[0] >= 0 and seen[-1] <= 0.999


def test_half_of_the_costliest_stage_is_about_half() -> None:
    progress = Progress({"base": 90.0, "decode": 10.0})
    assert progress.at("base", 10, 20) == 0.45
    assert progress.at("decode", 0, 1) == 0.9
    assert progress.at("base", 0, 20) == 0.9  # a step that comes late takes nothing back


def test_rates_are_those_measured() -> None:
    rates = Rates()
    rates.learn("base", 100.0, 50.0)
    rates.learn("decode", 10.0, 1.0)
    assert rates.expected_s({"base": 200.0, "decode": 10.0}) == {"base": 100.0, "decode": 1.0}
    rates.learn("base", 100.0, 100.0)
    assert 100.0 < rates.expected_s({"base": 200.0})["base"] < 200.0
    rates.learn("base", 0.0, 5.0)  # nothing was done: nothing is learned
    assert 100.0 < rates.expected_s({"base": 200.0})["base"] < 200.0


def test_work_counts_both_prompts_and_half_the_steps(tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    settings = write_settings(tmp_path_factory.mktemp("exports"))
    made = plan(GenerateRequest(prompt="x", steps=8), facts(settings), settings, 0)
    units = work(made, PRESETS["tiny"], PRESETS["tiny"])
    assert list(units) == list(STAGES)
    twice = plan(GenerateRequest(prompt="x", steps=16), facts(settings), settings, 0)
    assert work(twice, PRESETS["tiny"], PRESETS["tiny"])["base"] == 2 * units["base"]
    assert "refine" not in work(
        plan(GenerateRequest(prompt="x", refine=False), facts(settings), settings, 0), PRESETS["tiny"], None
    )
