"""A request becomes exact numbers, or one sentence that says what to ask for instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving.arguments import Arguments, settings_of
from serving.generate_request import GenerateRequest
from serving.plan import check_ranks, checkpoints, facts, plan
from serving.settings import Settings, load_settings
from tests.serving.exports import write_export, write_settings
from training.export import Facts, record_of
from training.recipe import load_recipe
from training.trainee import model_config
from waver_core.config import load_config
from waver_core.errors import ConfigError, UserError
from waver_core.shapes import VideoShape


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return write_settings(tmp_path_factory.mktemp("exports"))


def planned(settings: Settings, seed: int = 5, **asked: Any) -> Any:
    return plan(GenerateRequest(prompt="a disc", **asked), facts(settings), settings, seed)


def test_nothing_asked_for_is_the_models_own(settings: Settings) -> None:
    made = planned(settings)
    assert (made.width_px, made.height_px, made.base_width_px, made.base_height_px) == (96, 96, 64, 64)
    assert (made.frames, made.fps, made.seconds, made.steps, made.seed) == (9, 4.0, 2.25, 20, 5)
    assert made.refine and made.refiner_steps == 10  # half the steps
    assert made.guidance_scale == 4 and made.shift == 3.0 and made.checkpoint.startswith("t2v_192p_12fps@")


@pytest.mark.parametrize(("stage", "learned"), [("t2v_192p_12fps", False), ("t2v_480p", True)])
def test_it_is_told_whether_the_model_learned_from_given_frames(tmp_path: Path, stage: str, learned: bool) -> None:
    write_export(tmp_path / "base", stage)
    known = facts(Settings(cascade={"base": str(tmp_path / "base")}))  # type: ignore[arg-type]
    assert (known.learned_first_frames, known.learned_last_frames) == (learned, False)


def test_an_image_is_one_frame_and_may_stay_unrefined(settings: Settings) -> None:
    made = planned(settings, kind="image", refine=False)
    assert (made.frames, made.width_px, made.base_width_px, made.refiner_steps) == (1, 64, 64, 0)
    assert made.refiner_checkpoint is None


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"size": "100x96"}, "take 104x96|take 96x96"),
        ({"size": "4096x4096"}, "more than"),
        ({"size": "10x10"}, "take 16x16"),
        ({"seconds": 1.0}, "take 2 to 10"),
        ({"seconds": 11.0}, "take 2 to 10"),
        ({"steps": 500}, "at most 100"),
        ({"guidance_scale": 50.0}, "at most 20"),
        ({"style": "real"}, "without style words"),
        ({"kind": "image", "seconds": 3.0}, "neither seconds nor given frames"),
        ({"kind": "image", "first_frame": "x"}, "neither seconds nor given frames"),
        ({"size": "576x16"}, "too wide: at most 512 px"),
    ],
)
def test_what_the_model_cannot_do_is_one_sentence(settings: Settings, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        planned(settings, **asked)
    assert "\n" not in str(error.value)


@given(
    width=st.integers(2, 40),
    height=st.integers(2, 40),
    seconds=st.floats(2, 10),
    kind=st.sampled_from(["video", "image"]),
    refine=st.sampled_from([None, True, False]),
)
def test_every_plan_can_be_made(settings: Settings, width: int, height: int, seconds: float, kind: Any, refine: Any) -> None:
    asked = {"size": f"{8 * width}x{8 * height}", "kind": kind, "refine": refine}
    if kind == "video":
        asked["seconds"] = seconds
    try:
        made = planned(settings, **asked)
    except UserError:
        assert 64 * width * height > 4300  # only because it is larger than anything the models saw
        return
    assert VideoShape(made.frames, made.height_px, made.width_px).latent and made.base_shape.latent
    assert made.width_px == 8 * width and made.height_px == 8 * height
    assert (made.base_width_px <= made.width_px) and (made.base_height_px <= made.height_px)
    if kind == "video":
        assert abs(made.seconds - seconds) <= 1.0  # 1 + 4k frames at 4 a second


def test_styles_are_those_of_the_training_captions(settings: Settings, tmp_path: Path) -> None:
    tagged = write_export(tmp_path / "tagged", "t2v_192p_12fps", captions={"training_caption": 1.0})
    settings = settings.model_copy(update={"cascade": settings.cascade.model_copy(update={"base": tagged, "refiner": None})})
    assert "painting" in facts(settings).styles
    made = planned(settings, style="painting")
    assert made.style_words == "Painting style" and "low quality" in made.negative
    with pytest.raises(UserError, match="did you mean 'real'"):
        planned(settings, style="reel")


def test_the_reports_sizes() -> None:
    settings = load_settings(load_config(profiles=["full"]))
    assert settings.cascade.guidance_scale == 8 and settings.cascade.norm_threshold == 27 and settings.cascade.shift == 7.0
    assert settings.cascade.upscale * 720 == 1080


def test_checkpoints_that_cannot_be_served(settings: Settings, tmp_path: Path) -> None:
    cascade = settings.cascade

    def facts_with(**changes: Any) -> None:
        facts(settings.model_copy(update={"cascade": cascade.model_copy(update=changes)}))

    with pytest.raises(ConfigError, match="base is not set"):
        facts_with(base=None)
    with pytest.raises(ConfigError, match="is a refiner"):
        facts_with(base=cascade.refiner)
    with pytest.raises(ConfigError, match="is no refiner"):
        facts_with(refiner=cascade.base)
    with pytest.raises(UserError, match="is no export"):
        facts_with(base=str(tmp_path))


def test_a_model_of_images_makes_no_video(tmp_path: Path) -> None:
    settings = write_settings(tmp_path, refiner=False)
    still = write_export(tmp_path / "still", "t2i_256p")
    settings = settings.model_copy(update={"cascade": settings.cascade.model_copy(update={"base": still})})
    assert facts(settings).kinds == ("image",)
    with pytest.raises(UserError, match="set kind to image"):
        planned(settings)
    assert planned(settings, kind="image").frames == 1


def fake_export(folder: Path, stage: str) -> str:
    """`recipe.yaml` of a stage at the report's size: planning reads no weights."""
    recipe = load_recipe(load_config(profiles=["full"]), stage)
    facts_ = Facts(model_config(recipe, (4096, 5120)).to_dict(), {"autoencoder": "", "text": [], "features": None})
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**record_of(recipe, facts_), "digest": "0" * 32}))
    return str(folder)


def test_the_reports_cascade(tmp_path: Path) -> None:
    base, refiner = fake_export(tmp_path / "sft", "sft"), fake_export(tmp_path / "refine", "refine_sft_1080p")
    settings = settings_of(Arguments(profile="full", base=base, refiner=refiner))
    known = facts(settings)
    assert known.sizes == ("1920x1080", "1080x1920") and known.default_seconds == 5.0 and known.max_seconds == 10.0
    made = planned(settings, seconds=10.0)
    assert (made.base_width_px, made.base_height_px, made.width_px, made.height_px) == (1280, 720, 1920, 1080)
    assert (made.frames, made.fps, made.steps, made.refiner_steps, made.shift) == (237, 24, 40, 20, 7.0)
    assert (made.guidance_scale, made.norm_threshold) == (8, 27) and round(made.noise_weight, 6) == 0.9
    assert planned(settings, size="1280x720", refine=False).base_width_px == 1280
    assert planned(settings, kind="image", size="1920x1080", refine=False).frames == 1  # trained on larger images than videos
    with pytest.raises(UserError, match="take 1280x720"):
        planned(settings, size="1920x1080", refine=False)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("base={ranks: 3}", "24 heads|4 heads"),
        ("text={ranks: 2}", "only base and refiner"),
        ("refiner={ranks: 2, cfg_parallel: true}", "no negative|negative prompt"),
        ("base={ranks: 3, cfg_parallel: true}", "halved"),
    ],
)
def test_groups_that_cannot_share_a_model_are_refused(settings: Settings, part: str, told: str) -> None:
    cascade = settings.cascade
    with pytest.raises(ConfigError, match=told):
        other = settings_of(Arguments(profile="embedded,tiny", set=[f"serving.deployments.{part}"], base=cascade.base))
        check_ranks(other, *checkpoints(settings))
