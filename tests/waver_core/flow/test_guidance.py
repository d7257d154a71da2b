"""APG against an independent implementation, and what its parts promise: bounds, right angles, frames that keep to themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from waver_core.errors import UserError
from waver_core.flow.guidance import Apg, Cfg, apg, cfg

SHAPE = (2, 16, 3, 6, 4)
FRAME, VIDEO = (-4, -2, -1), (-4, -3, -2, -1)


def predictions(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def norm(x: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=over)


def test_cfg_extrapolates_from_the_unconditional() -> None:
    cond, uncond = predictions()
    assert torch.allclose(cfg(cond, uncond, 1.0), cond, atol=1e-6)
    assert torch.equal(cfg(cond, uncond, 0.0), uncond)
    assert torch.allclose(cfg(cond, uncond, 5.0), cond + 4 * (cond - uncond), atol=1e-5)
    assert torch.equal(Cfg(5.0).start()(cond, uncond), cfg(cond, uncond, 5.0))


@given(st.floats(0, 20), st.sampled_from(["chw", "cthw"]))
def test_apg_with_its_parts_off_is_cfg(scale: float, dims: Any) -> None:
    cond, uncond = predictions()
    guided, _ = apg(cond, uncond, Apg(scale=scale, norm_threshold=0, eta=1, dims=dims))
    assert torch.allclose(guided, cfg(cond, uncond, scale), atol=1e-4)


@pytest.mark.parametrize(("dims", "over"), [("chw", FRAME), ("cthw", VIDEO)])
def test_the_update_is_orthogonal_to_the_conditional_prediction(dims: Any, over: tuple[int, ...]) -> None:
    cond, uncond = predictions()
    update = apg(cond, uncond, Apg(eta=0, norm_threshold=0, dims=dims))[0] - cond
    cosine = (update * cond).sum(over) / (norm(update, over) * norm(cond, over))
    assert float(cosine.abs().max()) < 1e-5


def test_projecting_each_frame_is_not_projecting_the_video() -> None:
    cond, uncond = predictions()
    settings = [Apg(norm_threshold=0, dims="chw"), Apg(norm_threshold=0, dims="cthw")]
    by_frame, by_video = (apg(cond, uncond, one)[0] for one in settings)
    assert not torch.allclose(by_frame, by_video, atol=1e-3)
    image = cond[:, :, :1], uncond[:, :, :1]
    assert torch.allclose(apg(*image, settings[0])[0], apg(*image, settings[1])[0], atol=1e-5)


@given(st.floats(0.1, 40), st.sampled_from(["chw", "cthw"]))
def test_the_update_is_bounded_and_short_ones_are_left_alone(threshold: float, dims: Any) -> None:
    cond, uncond = predictions()
    over = FRAME if dims == "chw" else VIDEO
    update = apg(cond, uncond, Apg(scale=2, norm_threshold=threshold, eta=1, dims=dims))[0] - cond
    whole = norm(cond - uncond, over)
    assert torch.allclose(norm(update, over), whole.clamp(max=threshold), rtol=1e-4)


def test_each_frame_is_guided_as_if_it_were_alone() -> None:
    cond, uncond = predictions()
    uncond[:, :, 1] = cond[:, :, 1] - 100  # one frame that differs wildly
    guided, _ = apg(cond, uncond, Apg(norm_threshold=5, eta=0.5))
    for k in range(SHAPE[2]):
        alone, _ = apg(cond[:, :, k : k + 1], uncond[:, :, k : k + 1], Apg(norm_threshold=5, eta=0.5))
        assert torch.allclose(guided[:, :, k : k + 1], alone, atol=1e-5)
    calm = torch.tensor([0, 2])
    whole, _ = apg(cond, uncond, Apg(norm_threshold=5, eta=0.5, dims="cthw"))
    by_frame, by_video = ((g - cond)[:, :, calm].norm() for g in (guided, whole))
    assert by_frame > 5 * by_video  # over the whole video, the wild frame uses up the bound of the calm ones


def test_samples_of_a_batch_and_of_a_list_are_guided_apart() -> None:
    cond, uncond = predictions()
    batch = Apg(norm_threshold=5, momentum=-0.5).start()
    listed = Apg(norm_threshold=5, momentum=-0.5).start()
    for seed in range(3):
        cond, uncond = predictions(seed)
        together, one_by_one = batch(cond, uncond), listed(list(cond), list(uncond))
        assert torch.equal(torch.stack(one_by_one), together)
    short, long = predictions(1, (16, 1, 4, 4)), predictions(2, (16, 3, 6, 6))
    mixed = Apg().start()([short[0], long[0]], [short[1], long[1]])
    assert [list(part.shape) for part in mixed] == [[16, 1, 4, 4], [16, 3, 6, 6]]
    assert torch.equal(mixed[1], apg(*long, Apg())[0])


def test_momentum_adds_up_differences_and_belongs_to_one_run() -> None:
    rule = Apg(scale=2, norm_threshold=0, eta=1, momentum=-0.5)
    guide = rule.start()
    running = torch.zeros(SHAPE)
    for seed in range(4):
        cond, uncond = predictions(seed)
        running = (cond - uncond) - 0.5 * running
        assert torch.allclose(guide(cond, uncond) - cond, running, atol=1e-5)
    cond, uncond = predictions(9)
    assert torch.equal(rule.start()(cond, uncond), apg(cond, uncond, rule)[0])


def test_equal_predictions_and_zeros_stay_finite() -> None:
    cond, _ = predictions()
    assert torch.equal(apg(cond, cond, Apg())[0], cond)
    nothing = torch.zeros(SHAPE)
    assert torch.equal(apg(nothing, nothing, Apg())[0], nothing)


def test_a_scale_of_one_guides_nothing() -> None:
    cond, uncond = predictions()
    assert torch.equal(apg(cond, uncond, Apg(scale=1))[0], cond)


def test_low_precision_predictions_are_guided_in_fp32() -> None:
    cond, uncond = (part.bfloat16() for part in predictions())
    guided, average = apg(cond, uncond, Apg())
    assert guided.dtype == average.dtype == torch.float32
    assert torch.equal(guided, apg(cond.float(), uncond.float(), Apg())[0])


def test_clean_data_can_be_guided_through_the_velocity() -> None:
    """CFG is the same in both; APG is not, which is why the module says which one it guides."""
    (cond, uncond), x, t = predictions(), predictions(5)[0], 0.4

    def through_data(guide: Any) -> torch.Tensor:
        return (x - guide(x - t * cond, x - t * uncond)) / t

    assert torch.allclose(through_data(Cfg(5).start()), cfg(cond, uncond, 5), atol=1e-4)
    assert not torch.allclose(through_data(Apg().start()), apg(cond, uncond, Apg())[0], atol=1e-2)


@pytest.mark.parametrize(
    "wrong", [{"norm_threshold": -1}, {"momentum": -1.0}, {"dims": "hw"}, {"scale": float("nan")}, {"eta": float("inf")}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
        Apg(**wrong)


def test_shapes_that_do_not_fit_are_refused() -> None:
    cond, uncond = predictions()
    with pytest.raises(ValueError, match="same shape"):
        apg(cond, uncond[:1], Apg())
    with pytest.raises(ValueError, match="same shape"):
        apg(cond[0, 0], uncond[0, 0], Apg())
    with pytest.raises(ValueError, match="unconditional"):
        Apg().start()([cond[0], cond[1]], [uncond[0]])


@pytest.mark.models
@pytest.mark.parametrize("momentum", [None, -0.5])
@pytest.mark.parametrize("threshold", [0.0, 5.0])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dims", ["cthw", "chw"])
def test_parity_with_diffusers(momentum: float | None, threshold: float, eta: float, dims: Any) -> None:
    """diffusers' "original formulation" starts from the conditional prediction, with the scale counted from 0."""
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    guide = Apg(scale=8, norm_threshold=threshold, eta=eta, momentum=momentum or 0.0, dims=dims).start()
    buffer = None if momentum is None else MomentumBuffer(momentum)
    for seed in range(4):
        cond, uncond = predictions(seed)
        over = (1, 3, 4) if dims == "chw" else None
        theirs = normalized_guidance(cond, uncond, 7.0, buffer, eta, threshold, use_original_formulation=True, norm_dim=over)
        assert torch.allclose(guide(cond, uncond), theirs, rtol=1e-5, atol=1e-5)
