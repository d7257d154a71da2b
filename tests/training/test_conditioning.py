"""What the model is shown and must predict, and that it follows from counters alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.conditioning import Conditioner, Example, generator_of, lengthened
from training.data.shards import Sample
from training.recipe import Recipe
from waver_core.flow.timesteps import Mode, Shifted

DIMS = (16, 24)
Make = Callable[..., Recipe]


def array(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def sample_of(seed: int = 0, frames: int = 3, size: int = 2, captions: int = 2, **fields: Any) -> Sample:
    """Latents [16, frames, size, size] and texts of 2, 3, ... tokens."""
    rng = np.random.default_rng(seed)
    shape = (16, frames, size, size)
    parts = {
        "latents": array(rng, *shape),
        "last_latent": array(rng, 16, 1, size, size) if frames > 1 else None,
        "degraded": array(rng, *shape),
        "texts": [tuple(array(rng, 2 + c, dim) for dim in DIMS) for c in range(captions)],
        "features": array(rng, 1, 1, 1, 5),
    }
    return Sample(**{**parts, **fields})


def conditioner_of(recipe: Recipe) -> Conditioner:
    rng = np.random.default_rng(99)
    constants = {f"black_{px}x{px}": array(rng, 16, 1, px // 8, px // 8) for px in (16, 32)}
    constants |= {f"empty_text_{e}": array(rng, 1, dim) for e, dim in enumerate(DIMS)}
    return Conditioner(recipe, constants)


def noise_of(example: Example) -> Tensor:
    """n from x_t = (1 - t) x_0 + t n and n - x_0."""
    return example.inputs[:16] + (1 - example.t) * example.target


def same(a: Example, b: Example) -> bool:
    texts = all(torch.equal(x, y) for x, y in zip(a.texts, b.texts, strict=True))
    return texts and a.task == b.task and all(torch.equal(x, y) for x, y in zip(a[:3], b[:3]))


def many(recipe: Recipe, sample: Sample, n: int = 3000) -> list[Example]:
    conditioner = conditioner_of(recipe)
    return [conditioner.example(sample, generator_of(0, "stage", 0, k)) for k in range(n)]


def near(found: int, share: float, n: int) -> bool:
    """Within four deviations of a binomial."""
    return abs(found - share * n) < 4 * math.sqrt(share * (1 - share) * n)


def test_counters_alone_decide_in_any_order(encoding_recipe: Make) -> None:
    recipe = encoding_recipe("t2v_480p")
    samples = [sample_of(i, frames=(1, 3)[i % 2]) for i in range(6)]
    forwards, backwards = conditioner_of(recipe), conditioner_of(recipe)
    first = {i: forwards.example(s, generator_of(0, "stage", 3, f"id{i}", 1)) for i, s in enumerate(samples)}
    torch.manual_seed(5)  # nothing global is asked
    for i in reversed(range(6)):
        assert same(first[i], backwards.example(samples[i], generator_of(0, "stage", 3, f"id{i}", 1)))


def test_every_counter_counts() -> None:
    counters = (0, "t2v", 3, "id", 1)
    changed = [counters[:i] + (other,) + counters[i + 1 :] for i, other in enumerate((1, "t2i", 4, "di", 0))]
    draws = [torch.rand(4, generator=generator_of(*c)) for c in (counters, *changed)]
    assert len({tuple(d.tolist()) for d in draws}) == 6
    assert torch.equal(draws[0], torch.rand(4, generator=generator_of(*counters)))


def test_the_seed_is_the_same_in_every_process() -> None:
    """Typed here: it must hang on nothing that a process has of its own, such as `hash` of a string."""
    assert generator_of(0, "t2v_480p", 3, "abc", 1).initial_seed() == 7777619582556278528


@pytest.mark.parametrize("frames", [1, 3])
def test_inputs_are_between_data_and_noise_and_the_target_is_noise_minus_data(frames: int, encoding_recipe: Make) -> None:
    sample = sample_of(frames=frames, size=4)
    x0 = torch.from_numpy(sample.latents)
    noises = []
    for example in many(encoding_recipe("t2v_480p"), sample, 40):
        assert example.inputs.shape == (36, frames, 4, 4) and example.target.shape == (16, frames, 4, 4)
        assert example.inputs.dtype == example.target.dtype == example.t.dtype == torch.float32 and example.t.shape == ()
        n, t = noise_of(example), example.t
        assert torch.allclose(example.target, n - x0, atol=1e-5)
        assert torch.allclose(example.inputs[:16], (1 - t) * x0 + t * n, atol=1e-5)
        noises.append(n)
    noise = torch.stack(noises)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert (noise[0] - noise[1]).abs().max() > 0.5


def test_text_is_dropped_and_frames_are_given_as_often_as_the_recipe_says(encoding_recipe: Make) -> None:
    n = 3000
    recipe = encoding_recipe("t2v_480p", "training.data.text_dropout=0.1", "training.data.interpolation_probability=0.05")
    assert recipe.i2v_probability == 0.2
    sample = sample_of()
    empty = conditioner_of(recipe)._empty
    examples = many(recipe, sample, n)
    dropped = [all(torch.equal(a, b) for a, b in zip(e.texts, empty)) for e in examples]
    tasks = [e.task for e in examples]
    assert near(sum(dropped), 0.1, n)
    assert near(tasks.count("i2v"), 0.2, n) and near(tasks.count("interpolation"), 0.05, n)
    assert near(sum(d and t == "i2v" for d, t in zip(dropped, tasks)), 0.02, n)  # independent of each other


def test_captions_are_used_in_parts(encoding_recipe: Make) -> None:
    n = 3000
    recipe = encoding_recipe("t2v_192p_12fps", "training.data.text_dropout=0")
    assert recipe.data.captions == {"training_caption": 0.8, "caption_short": 0.2}
    lengths = [len(e.texts[0]) for e in many(recipe, sample_of(), n)]
    assert set(lengths) == {2, 3} and near(lengths.count(2), 0.8, n)
    assert {len(e.texts[0]) for e in many(recipe, sample_of(captions=1), 50)} == {2}


def test_timesteps_are_the_recipes_mode_shifted(encoding_recipe: Make) -> None:
    recipe = encoding_recipe("t2v_480p")
    t = torch.stack([e.t for e in many(recipe, sample_of())]).sort().values
    reference = Shifted(Mode(1.29), recipe.shift).sample(torch.Generator().manual_seed(0), (20_000,)).sort().values
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(t[int(q * len(t))] - reference[int(q * len(reference))]) < 0.03
    images = torch.stack([e.t for e in many(recipe, sample_of(frames=1))])
    logits = torch.logit(images) - math.log(recipe.shift)  # the shift adds its logarithm to the logit
    assert abs(logits.mean() - 0.5) < 0.08 and abs(logits.std() - 1) < 0.06


def test_nothing_given_is_black_and_unmarked(encoding_recipe: Make) -> None:
    conditioner = conditioner_of(encoding_recipe("t2v_192p_12fps"))
    for frames, kind, task in ((1, "image", "t2i"), (3, "video", "t2v")):
        sample = sample_of(frames=frames, size=4)
        example = conditioner.example(sample, generator_of(1))
        assert (example.kind, example.task) == (kind, task)
        black = conditioner.black(torch.from_numpy(sample.latents))
        assert black.shape == (16, 1, 4, 4)
        assert torch.equal(example.inputs[16:32], black.expand(-1, frames, -1, -1))
        assert not example.inputs[32:].any()


def test_a_given_first_frame_is_the_clean_one(encoding_recipe: Make) -> None:
    sample = sample_of()
    conditioner = conditioner_of(encoding_recipe("t2v_480p", "training.stages.t2v_480p.i2v_probability=1"))
    example = conditioner.example(sample, generator_of(1))
    assert example.task == "i2v"
    x0 = torch.from_numpy(sample.latents)
    assert torch.equal(example.inputs[16:32, 0], x0[:, 0])
    assert torch.equal(example.inputs[16:32, 1:], conditioner.black(x0).expand(-1, 2, -1, -1))
    assert (example.inputs[32:, 0] == 1).all() and not example.inputs[32:, 1:].any()
    assert not torch.equal(example.inputs[:16, 0], x0[:, 0])  # the given frame is noised all the same


def test_a_given_last_frame_is_encoded_as_an_image(encoding_recipe: Make) -> None:
    sample = sample_of()
    sets = ("training.stages.t2v_480p.i2v_probability=0", "training.data.interpolation_probability=1")
    conditioner = conditioner_of(encoding_recipe("t2v_480p", *sets))
    example = conditioner.example(sample, generator_of(1))
    assert example.task == "interpolation" and sample.last_latent is not None
    assert torch.equal(example.inputs[16:32, 0], torch.from_numpy(sample.latents)[:, 0])
    assert torch.equal(example.inputs[16:32, 2], torch.from_numpy(sample.last_latent)[:, 0])
    flags = [[bool((example.inputs[32 + c, k] == 1).all()) for c in range(4)] for k in range(3)]
    assert flags == [[True] * 4, [False] * 4, [False, False, False, True]]


def test_images_are_never_given_themselves(encoding_recipe: Make) -> None:
    recipe = encoding_recipe("t2v_480p", "training.stages.t2v_480p.i2v_probability=1")
    assert {e.task for e in many(recipe, sample_of(frames=1), 20)} == {"t2i"}


def test_the_refiner_goes_from_degraded_to_clean(encoding_recipe: Make) -> None:
    """x_n = (1 - w_d) x + w_d n, input w x_n + (1 - w) x_0, target x_0 - x_n (§2.2)."""
    sample = sample_of(size=4)
    assert sample.degraded is not None
    x0, x = torch.from_numpy(sample.latents), torch.from_numpy(sample.degraded)
    weights, times = [], []
    recipe = encoding_recipe("refine_1080p", "training.refinement={noise_min: 0.85, noise_max: 0.95}")
    for k, example in enumerate(many(recipe, sample, 200)):
        x_n = x0 - example.target
        assert torch.allclose(example.inputs[:16], example.t * x_n + (1 - example.t) * x0, atol=1e-5)
        generator = generator_of(0, "stage", 0, k)  # the noise is drawn in the order of every other task
        torch.rand(3, generator=generator), torch.rand((), generator=generator)
        n = torch.randn(x0.shape, generator=generator)
        w_d = ((x_n - x) * (n - x)).sum() / (n - x).square().sum()
        assert torch.allclose(x_n, (1 - w_d) * x + w_d * n, atol=1e-4)
        weights.append(float(w_d))
        times.append(float(example.t))
        assert example.task == "refine" and not example.inputs[32:].any()
    assert 0.849 < min(weights) < 0.857 and 0.943 < max(weights) < 0.951
    assert 0.5 < np.mean(times) < 0.9 and min(times) < 0.2  # uniform, then shifted by 4.5


def test_a_refine_stage_says_what_its_samples_lack(encoding_recipe: Make) -> None:
    with pytest.raises(ValueError, match="degraded"):
        conditioner_of(encoding_recipe("refine_1080p")).example(sample_of(degraded=None), generator_of(1))


@pytest.mark.parametrize("stage", ["t2v_480p", "refine_1080p"])
def test_at_a_held_out_timestep_nothing_is_dropped_or_given_and_the_noise_is_the_same(stage: str, encoding_recipe: Make) -> None:
    sets = ("training.data.text_dropout=1", f"training.stages.{stage}.i2v_probability=1")
    conditioner, sample = conditioner_of(encoding_recipe(stage, *sets)), sample_of(size=4)
    found = [conditioner.example(sample, generator_of(2), t) for t in (0.1, 0.5, 0.9)]
    trained = conditioner.example(sample, generator_of(2))
    for example, t in zip(found, (0.1, 0.5, 0.9)):
        assert float(example.t) == pytest.approx(t) and example.t.dtype == torch.float32
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(example.texts, sample.texts[0]))
        assert not example.inputs[32:].any()
        assert torch.equal(example.target, trained.target)
    assert (len(trained.texts[0]), len(found[0].texts[0])) == (1, 2)


def test_held_out_ends_of_time_keep_their_margin(encoding_recipe: Make) -> None:
    conditioner = conditioner_of(encoding_recipe("t2v_480p"))
    assert 0 < float(conditioner.example(sample_of(), generator_of(2), 0.0).t) < 1e-4
    assert 1 - 1e-4 < float(conditioner.example(sample_of(), generator_of(2), 1.0).t) < 1


def test_texts_are_lengthened_with_zeros_to_a_multiple(encoding_recipe: Make) -> None:
    for dropout in (0, 1):
        recipe = encoding_recipe("t2v_480p", "training.data.text_multiple=4", f"training.data.text_dropout={dropout}")
        example = conditioner_of(recipe).example(sample_of(), generator_of(1))
        for text, dim in zip(example.texts, DIMS, strict=True):
            assert text.shape == (4, dim) and text[0].any() and not text[3:].any()
    text = torch.ones(8, 3)
    assert lengthened(text, 4).shape == (8, 3) and lengthened(text, 5).shape == (10, 3) and lengthened(text, 1).shape == (8, 3)


def test_features_and_texts_travel_along_and_a_move_keeps_everything(encoding_recipe: Make) -> None:
    sample = sample_of()
    example = conditioner_of(encoding_recipe("t2v_480p", "training.data.text_dropout=0")).example(sample, generator_of(1))
    assert example.features is not None and np.array_equal(example.features.numpy(), sample.features)  # type: ignore[arg-type]
    moved = example.to("cpu")
    assert same(example, moved) and moved.kind == "video" and moved.features is not None
    assert example._replace(features=None).to("cpu").features is None


def test_a_black_image_of_a_size_that_was_not_encoded_is_not_invented(encoding_recipe: Make) -> None:
    with pytest.raises(KeyError, match="black_48x48"):
        conditioner_of(encoding_recipe("t2v_480p")).example(sample_of(size=6), generator_of(1))
