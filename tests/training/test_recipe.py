"""Every stage resolves; the figures are those of Waver Table 2, typed here from the report."""

from __future__ import annotations

import pytest

from training.recipe import Recipe, load_recipe, recipe_from_yaml, stages
from waver_core.config import load_config
from waver_core.dit import PRESETS
from waver_core.errors import ConfigError, UserError
from waver_core.flow.timesteps import named

WIDE = {"192p": (192, 352), "480p": (480, 864), "720p": (720, 1280), "1080p": (1080, 1920)}

# stage: task, video, images, fps, epochs, learning rate, sigma shift, (video, image) clips in millions
TABLE_2 = {
    "t2i_256p": ("t2i", None, 256, None, 24, 1e-4, 1.0, (0, 170)),
    "t2i_512p": ("t2i", None, 512, None, 3, 6e-5, 2.0, (0, 100)),
    "t2i_1024p": ("t2i", None, 1024, None, 1, 3e-5, 3.0, (0, 60)),
    "t2v_192p_12fps": ("t2v", "192p", ["192p"], 12, 2, 1e-4, 1.5, (185, 40)),
    "t2v_192p_16fps": ("t2v", "192p", ["192p"], 16, 1.5, 1e-4, 1.5, (185, 40)),
    "t2v_480p": ("t2v", "480p", ["480p"], 16, 3, 5e-5, 2.5, (41, 40)),
    "t2v_720p": ("t2v", "720p", ["720p", "1080p"], 24, 1, 3e-5, 3.0, (22, 15)),
    "ct_720p": ("t2v", "720p", ["720p", "1080p"], 24, 2, 1e-5, 3.0, (4, 15)),
    "sft": ("t2v", "720p", ["720p", "1080p"], 24, 2, 5e-6, 3.0, (0.1, 15)),
    "refine_1080p": ("refine", "1080p", ["1080p"], 24, 1, 1e-5, 4.5, (3, 3)),
    "refine_sft_1080p": ("refine", "1080p", ["1080p"], 24, 1, 5e-6, 4.5, (0.2, 3)),
}
LINEAGE = {b: a for a, b in zip([None, *TABLE_2], TABLE_2)} | {"refine_1080p": "ct_720p"}


def recipe(stage: str, *sets: str, profiles: tuple[str, ...] = ()) -> Recipe:
    return load_recipe(load_config(None, profiles, sets), stage)


@pytest.fixture(scope="module")
def report() -> dict[str, Recipe]:
    """Every stage as the report has it: no profile."""
    config = load_config()
    return {stage: load_recipe(config, stage) for stage in stages(config)}


def test_the_stages_are_the_eleven_of_table_2_in_its_order(report: dict[str, Recipe]) -> None:
    assert list(report) == list(TABLE_2)
    assert {stage: r.after for stage, r in report.items()} == LINEAGE


def test_figures_are_those_of_table_2(report: dict[str, Recipe]) -> None:
    for stage, (task, video, images, fps, epochs, lr, shift, volume) in TABLE_2.items():
        r = report[stage]
        assert (r.task, r.fps, r.epochs, r.optimizer.lr, r.shift) == (task, fps, epochs, lr, shift), stage
        assert r.volume_m is not None and (r.volume_m.video, r.volume_m.image) == volume, stage
        assert set(r.video_sizes) == ({WIDE[video], WIDE[video][::-1]} if video else set()), stage
        if isinstance(images, list):
            assert set(r.image_sizes) == {size for name in images for size in (WIDE[name], WIDE[name][::-1])}, stage


def test_images_alone_come_in_five_aspect_ratios_of_about_the_named_area(report: dict[str, Recipe]) -> None:
    for stage, (task, _, side, *_) in TABLE_2.items():
        if task != "t2i":
            continue
        sizes = report[stage].image_sizes
        wanted = [1, 16 / 9, 9 / 16, 4 / 3, 3 / 4]
        assert len(sizes) == 5
        for ratio in wanted:
            assert min(abs(w / h / ratio - 1) for h, w in sizes) < 0.05
        for h, w in sizes:
            assert abs(h * w / side**2 - 1) < 0.06 and h % 16 == w % 16 == 0, (stage, h, w)


def test_what_section_4_says_of_single_stages(report: dict[str, Recipe]) -> None:
    assert [s for s, r in report.items() if r.align] == ["t2v_480p"]
    assert [s for s, r in report.items() if r.i2v_probability == 0.2] == ["t2v_480p", "t2v_720p", "ct_720p", "sft"]
    assert {r.i2v_probability for r in report.values()} == {0.0, 0.2}
    assert [s for s, r in report.items() if r.min_short_side_px] == ["t2i_256p", "t2i_512p", "t2i_1024p", "refine_sft_1080p"]
    for r in report.values():
        assert (r.alignment.weight, r.alignment.block, r.alignment.spatial_factor, r.alignment.temporal_factor) == (0.5, 16, 2, 4)
        assert (r.refinement.pixel_factor, r.refinement.noise_min, r.refinement.noise_max) == (3, 0.85, 0.95)
        assert (r.sampling.guidance_scale, r.sampling.norm_threshold) == (8, 27)
        assert r.sampling.shift == (1.0 if r.task == "refine" else 7.0)
        assert (r.model.preset, r.encoders.autoencoder.backend) == ("waver_12b", "wan_vae")
        assert [t.backend for t in r.encoders.text] == ["t5", "qwen2_5"]


def test_timesteps_are_logit_normal_for_images_mode_for_video_uniform_for_the_refiner(report: dict[str, Recipe]) -> None:
    for r in report.values():
        image, video = r.timesteps["image"], r.timesteps["video"]
        if r.task == "refine":
            assert image.distribution == video.distribution == "uniform"
        else:
            assert (image.distribution, image.mean, image.std) == ("logit_normal", 0.5, 1.0)
            assert (video.distribution, video.scale) == ("mode", 1.29)


@pytest.mark.parametrize(
    "profiles", [("embedded",), ("small",), ("full",), ("cluster",), ("demo",), ("embedded", "tiny"), ("embedded", "demo")]
)
def test_every_stage_resolves_under_every_profile(profiles: tuple[str, ...]) -> None:
    config = load_config(None, profiles)
    for stage in TABLE_2:
        r = load_recipe(config, stage)
        assert r.stage == stage and r.profiles == profiles
        assert r.model.preset in PRESETS
        for spec in r.timesteps.values():
            named(spec.distribution, mean=spec.mean, std=spec.std, scale=spec.scale)
        assert list(r.frame_counts) == sorted(set(r.frame_counts)) and all(n % 4 == 1 and n >= 5 for n in r.frame_counts)


def test_the_embedded_profile_needs_no_gpu_and_keeps_the_reports_shifts_and_lineage() -> None:
    config = load_config(None, ["embedded"])
    for stage, row in TABLE_2.items():
        r = load_recipe(config, stage)
        assert (r.shift, r.after, r.task) == (row[6], LINEAGE[stage], row[0])
        assert r.model.preset.startswith("tiny") and r.workers.gpus == 0 and r.encoders.autoencoder.backend == "dct"
        assert max(max(size) for size in (*r.video_sizes, *r.image_sizes)) <= 128


def test_frame_counts_are_the_1_plus_4k_that_the_seconds_fill() -> None:
    assert recipe("t2v_480p").frame_counts == (29, 45, 61, 77, 93, 125, 157)
    assert recipe("t2v_720p", "training.data.seconds=[5, 10]").frame_counts == (117, 237)
    assert recipe("t2v_480p", "training.data.seconds=[0.1, 0.2]").frame_counts == (5,)
    assert recipe("t2v_480p", "training.data.seconds=[2.25]", "training.stages.t2v_480p.fps=4").frame_counts == (9,)
    assert recipe("t2i_256p").frame_counts == ()


def test_a_stage_overrides_shared_settings_and_the_rest_stays() -> None:
    own = "training.stages.t2v_480p"
    changed = recipe("t2v_480p", f"{own}.data={{windows: 3}}", f"{own}.timesteps.video.scale=0.5")
    assert changed.data.windows == 3 and changed.data.micro_batches_per_step == 256
    assert changed.timesteps["video"].scale == 0.5 and changed.timesteps["video"].distribution == "mode"
    assert recipe("t2v_720p").data.windows == 1


@pytest.mark.parametrize(
    ("override", "stage", "words"),
    [
        ("training.stages.t2v_480p.shfit=1", "t2v_480p", r"t2v_480p\.shfit: unknown key, did you mean 'shift'"),
        ("training.optimizer.weigth_decay=1", "t2v_480p", "unknown key, did you mean 'weight_decay'"),
        ("training.optimzer={lr: 1}", "t2v_480p", r"training\.optimzer: unknown key, did you mean 'optimizer'"),
        ("training.stages.t2v_480p.tier=481p", "t2v_480p", "no tier '481p': did you mean '480p'"),
        ("training.stages.t2v_480p.video=48p", "t2v_480p", r"t2v_480p\.video: no resolution '48p': did you mean '480p'"),
        ("training.stages.t2v_480p.image=[480p, 108p]", "t2v_480p", "no resolution '108p': did you mean '1080p'"),
        ("training.stages.t2v_480p.after=t2v_480", "t2v_480p", "no training stage 't2v_480': did you mean 't2v_480p'"),
        ("training.data.seed=1", "t2v_48p", "no training stage 't2v_48p': did you mean 't2v_480p'"),
        ("training.stages.t2v_480p.fps=null", "t2v_480p", "`fps` belongs to stages with video"),
        ("training.stages.t2v_480p.video=null", "t2v_480p", "needs `video`"),
        ("training.stages.t2i_256p.video=192p", "t2i_256p", "takes no video"),
        ("training.stages.t2i_256p.fps=12", "t2i_256p", "`fps` belongs"),
        ("training.encoders.features=null", "t2v_480p", r"`align` needs encoders\.features"),
        ("training.timesteps={image: {distribution: uniform}}", "t2v_480p", r"timesteps\.video is missing"),
        ("training.timesteps.video.distribution=moed", "t2v_480p", "mode"),
        ("training.resolutions.480p={'16:9': [481, 864]}", "t2v_480p", "multiples of 8"),
        ("training.stages.t2v_480p.epochs=0", "t2v_480p", "epochs"),
        ("training.stages={}", "t2v_480p", r"training\.stages"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_the_nearest_right(override: str, stage: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        recipe(stage, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", TABLE_2)
def test_a_recipe_goes_through_yaml_and_back(stage: str, report: dict[str, Recipe]) -> None:
    again = recipe_from_yaml(report[stage].to_yaml(), "recipe.yaml")
    assert again == report[stage] and again.digest == report[stage].digest


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "no valid YAML"), ("- 1", "holds no recipe"), ("", "holds no recipe"), ("stage: x", "recipe.yaml")],
)
def test_files_that_are_no_recipes_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe_from_yaml(text, "recipe.yaml")


def test_digests_tell_settings_apart_and_nothing_else() -> None:
    assert recipe("t2v_480p").digest == recipe("t2v_480p").digest
    digests = {
        recipe("t2v_480p", *sets).digest for sets in ((), ("training.data.seed=1",), ("training.stages.t2v_480p.lr=1e-5",))
    }
    assert len(digests | {recipe("t2v_720p").digest}) == 4
    assert all(len(d) == 12 for d in digests)
