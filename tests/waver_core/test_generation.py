"""From prompts to latents: the seed alone decides, given frames reach the network, and the refiner starts degraded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from waver_core.backends.embedded.dct_codec import DctCodec
from waver_core.backends.embedded.hashed_text import HashedPairs, HashedWords
from waver_core.config import load_config
from waver_core.denoising import noise_of, sharpen
from waver_core.dit import DiTConfig, WaverDiT
from waver_core.errors import UserError
from waver_core.flow.degradation import degrade_latents
from waver_core.flow.guidance import Apg, Cfg
from waver_core.flow.sampler import Stop
from waver_core.generation import Generator, Task, encoders_by_name
from waver_core.registry import create
from waver_core.shapes import VideoShape

VIDEO, IMAGE = VideoShape(9, 32, 48), VideoShape(1, 40, 24)
SETTINGS: dict[str, Any] = {"steps": 3, "shift": 3.0, "guidance": Apg(scale=4.0, norm_threshold=5.0)}


class Spy(Generator):
    """Keeps what the network is shown: (inputs, texts, timesteps) of every forward."""

    def __init__(self, text_multiple: int = 1) -> None:
        torch.set_num_threads(1)
        dit = WaverDiT(DiTConfig(1, 2, 2, 16, text_dims=(16, 24), max_grid=(4, 8, 8)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in dit.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        super().__init__(dit, DctCodec(), [HashedWords(dim=16), HashedPairs(dim=24)], text_multiple)
        self.seen: list[tuple[list[torch.Tensor], list[tuple[torch.Tensor, ...]], torch.Tensor]] = []
        forward = dit.velocity

        def velocity(latents: Any, texts: Any, timesteps: Any, tap: Any = None) -> Any:
            self.seen.append((list(latents), list(texts), timesteps.clone()))
            return forward(latents, texts, timesteps, tap)

        dit.velocity = velocity  # type: ignore[method-assign]


@pytest.fixture
def spy() -> Spy:
    return Spy()


@pytest.fixture
def picture() -> Callable[[int], np.ndarray]:
    return lambda seed: np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def test_a_seed_makes_the_same_latents_alone_and_in_any_batch(spy: Spy) -> None:
    tasks = [
        Task("a red disc", VIDEO, 7),
        Task("a blue one moves to the left", IMAGE, 8),
        Task("green", VIDEO, 9, negative="blur"),
    ]
    together = spy.latents(tasks, **SETTINGS)
    again = spy.latents(tasks[::-1], **SETTINGS)[::-1]
    for task, out, reordered in zip(tasks, together, again, strict=True):
        assert out.shape == (16, *task.shape.latent) and out.dtype == torch.float32
        (alone,) = spy.latents([task], **SETTINGS)
        assert torch.allclose(out, alone, atol=1e-5) and torch.allclose(out, reordered, atol=1e-5)


def test_seed_and_prompt_and_negative_prompt_decide(spy: Spy) -> None:
    task = Task("a red disc", VIDEO, 7)
    tasks = [task, replace(task, seed=8), replace(task, prompt="a blue disc"), replace(task, negative="dark")]
    results = spy.latents(tasks, **SETTINGS)
    assert all((results[0] - other).abs().max() > 1e-3 for other in results[1:])


def test_one_forward_a_step_holds_prompts_then_negative_prompts_at_one_fp32_timestep(spy: Spy) -> None:
    spy.latents([Task("a red disc", VIDEO, 7, negative="dark"), Task("green", VIDEO, 8)], **SETTINGS)
    assert len(spy.seen) == SETTINGS["steps"]
    inputs, texts, timesteps = spy.seen[0]
    assert timesteps.tolist() == [1.0] * 4 and timesteps.dtype == torch.float32
    assert torch.equal(inputs[0], inputs[2]) and torch.equal(inputs[1], inputs[3])
    for text, words in zip(texts, ("a red disc", "green", "dark", ""), strict=True):
        for vector, encoder in zip(text, spy.text_encoders, strict=True):
            assert np.array_equal(vector.numpy(), encoder.encode([words])[0])
    assert spy.seen[1][2][0] < 1


def test_without_frames_the_condition_is_black_and_the_mask_empty(spy: Spy) -> None:
    spy.latents([Task("a red disc", VIDEO, 7)], **SETTINGS)
    first = spy.seen[0][0][0]
    black = torch.from_numpy(spy.autoencoder.encode([np.zeros((1, 32, 48, 3), np.uint8)])[0])
    assert torch.equal(first[16:32], black.expand(-1, 3, -1, -1)) and not first[32:].any()
    assert torch.equal(first[:16], torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("places", ["first", "last", "both"])
def test_given_frames_reach_the_network_at_every_step(spy: Spy, picture: Callable[[int], np.ndarray], places: str) -> None:
    first, last = (picture(1) if places != "last" else None), (picture(2) if places != "first" else None)
    spy.latents([Task("a red disc", VIDEO, 7, first_frame=first, last_frame=last)], **SETTINGS)
    black = spy.black(VIDEO)[:, 0]
    for inputs, _, _ in spy.seen:
        for shown in inputs:  # with the prompt, and with the negative one
            for place, frame in ((0, first), (2, last)):
                wanted = black if frame is None else torch.from_numpy(spy.autoencoder.encode([frame[None]])[0])[:, 0]
                assert torch.equal(shown[16:32, place], wanted)
            assert torch.equal(shown[16:32, 1], black)
            flags = [int(bool(shown[32 + c, k].all())) for k in range(3) for c in range(4)]
            assert flags == [int(first is not None)] * 4 + [0] * 7 + [int(last is not None)]
            assert shown[32:].sum() == sum(flags) * 4 * 6


def test_a_first_frame_in_a_batch_is_for_its_own_video_only(spy: Spy, picture: Callable[[int], np.ndarray]) -> None:
    plain = Task("a red disc", VIDEO, 7)
    (alone,) = spy.latents([plain], **SETTINGS)
    both = spy.latents([Task("a red disc", VIDEO, 7, first_frame=picture(1)), plain], **SETTINGS)
    assert torch.allclose(both[1], alone, atol=1e-5)
    assert (both[0] - alone).abs().max() > 1e-3


def test_a_given_first_frame_is_held_and_free_to_drift_without(spy: Spy, picture: Callable[[int], np.ndarray]) -> None:
    task = Task("a red disc", VIDEO, 7, first_frame=picture(1))
    known = torch.from_numpy(spy.autoencoder.encode([picture(1)[None]])[0])
    (held,), (free,) = spy.latents([task], **SETTINGS), spy.latents([task], hold=False, **SETTINGS)
    assert torch.allclose(held[:, :1], known, atol=1e-5)
    assert (free[:, :1] - known).abs().max() > 0.1
    noisy = [inputs[0][:16, :1] for inputs, _, _ in spy.seen[1:3]]  # on the way, too, it is what training showed
    times = [t[0] for _, _, t in spy.seen[1:3]]
    noise = spy.seen[0][0][0][:16, :1]
    for x, t in zip(noisy, times, strict=True):
        assert torch.allclose(x, (1 - t) * known + t * noise, atol=1e-5)


def test_kept_texts_need_no_encoder(spy: Spy) -> None:
    task = Task("a red disc", VIDEO, 7)
    (before,) = spy.latents([task], **SETTINGS)
    spy.keep_texts(["a red disc", ""])
    assert spy.text_encoders == ()
    assert torch.equal(spy.latents([task], **SETTINGS)[0], before)


def test_texts_are_lengthened_as_in_training() -> None:
    spy = Spy(text_multiple=8)
    spy.latents([Task("a red disc moves", VIDEO, 7)], **SETTINGS)
    for text in spy.seen[0][1]:
        for vector in text:
            assert len(vector) == 8
    known = spy.text_encoders[0].encode(["a red disc moves"])[0]
    shown = spy.seen[0][1][0][0]
    assert np.array_equal(shown[: len(known)].numpy(), known) and not shown[len(known) :].any()


def test_on_step_ends_it_between_two_steps(spy: Spy) -> None:
    with pytest.raises(Stop, match="stopped after 1 of 3"):
        spy.latents([Task("a red disc", VIDEO, 7)], on_step=lambda done, steps, state: done < 1, **SETTINGS)
    assert len(spy.seen) == 1


def test_refining_starts_at_the_degraded_video_and_is_conditioned_on_nothing_but_text(spy: Spy) -> None:
    tasks = [Task("a red disc", VIDEO, 7), Task("green", IMAGE, 8)]
    rng = np.random.default_rng(0)
    videos = [rng.integers(0, 256, (t.shape.frames, t.shape.height_px, t.shape.width_px, 3), dtype=np.uint8) for t in tasks]
    results = spy.refined(videos, tasks, steps=2, shift=1.0, noise_weight=0.9)
    assert [r.shape for r in results] == [(16, *t.shape.latent) for t in tasks]
    assert len(spy.seen) == 2
    for task, video, shown in zip(tasks, videos, spy.seen[0][0], strict=True):
        noise = torch.randn(16, *task.shape.latent, generator=torch.Generator().manual_seed(task.seed))
        clean = torch.from_numpy(spy.autoencoder.encode([video])[0])
        assert torch.equal(shown[:16], degrade_latents(clean, noise, torch.tensor(0.9)))
        assert not shown[32:].any()
    (alone,) = spy.refined(videos[1:], tasks[1:], steps=2, shift=1.0, noise_weight=0.9)
    assert torch.allclose(results[1], alone, atol=1e-5)


def test_the_refiner_leads_a_given_first_frame_to_that_frame_and_its_own_video_only(
    spy: Spy, picture: Callable[[int], np.ndarray]
) -> None:
    inputs = [spy.inputs(Task("a red disc", VIDEO, 7, first_frame=shown)) for shown in (picture(1), None)]
    rng = np.random.default_rng(0)
    starts = [torch.from_numpy(rng.standard_normal((16, *VIDEO.latent)).astype(np.float32)) for _ in inputs]
    options: dict[str, Any] = {"steps": 3, "shift": 1.0, "noise_weight": 0.9}
    spy.seen.clear()
    held, other = sharpen(spy.dit, starts, inputs, **options)
    known = inputs[0].given[0]
    assert torch.allclose(held[:, :1], known, atol=1e-5)
    begun = spy.seen[0][0][0][:16, :1]
    for shown, _, t in spy.seen:  # on the way, too, it is what training showed: a mixture of degraded and clean
        assert torch.allclose(shown[0][:16, :1], t[0] * begun + (1 - t[0]) * known, atol=1e-5)
        assert not shown[0][32:].any()
    free, other_again = sharpen(spy.dit, starts, inputs, hold=False, **options)
    assert (free[:, :1] - known).abs().max() > 0.1
    assert torch.equal(other, other_again)


def test_a_refiner_that_knows_the_answer_finds_it(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its target is x_0 - x_n (§2.2), so following it from x_n ends at x_0."""
    task = Task("", VIDEO, 7)
    degraded = np.zeros((16, 3, 4, 6), np.float32)
    clean = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    x_n = degrade_latents(torch.from_numpy(degraded), noise_of(spy.inputs(task)), torch.tensor(0.9))
    monkeypatch.setattr(spy.dit, "velocity", lambda inputs, texts, t: ([clean - x_n], None))
    (out,) = spy.refined_latents([degraded], [task], [spy._text("")], steps=3, shift=2.0, noise_weight=0.9)
    assert torch.allclose(out, clean, atol=1e-5)


def test_a_base_model_that_knows_the_answer_finds_it(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its target is n - x_0 (§4.3), so following it from noise ends at x_0; alike predictions leave guidance nothing to do."""
    task = Task("", VIDEO, 7)
    clean = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(spy.dit, "velocity", lambda inputs, texts, t: ([noise_of(spy.inputs(task)) - clean] * 2, None))
    (out,) = spy.latents([task], steps=3, shift=7.0, guidance=Cfg(8.0))
    assert torch.allclose(out, clean, atol=1e-5)


def test_decoding_gives_pictures_of_the_size_asked_for(spy: Spy) -> None:
    tasks = [Task("a red disc", VIDEO, 7), Task("green", IMAGE, 8)]
    for task, video in zip(tasks, spy.decode(spy.latents(tasks, **SETTINGS)), strict=True):
        assert video.shape == (*task.shape, 3) and video.dtype == np.uint8


def test_shapes_that_cannot_be_encoded_are_refused(spy: Spy) -> None:
    with pytest.raises(UserError, match="1 \\+ 4k"):
        spy.latents([Task("a red disc", VideoShape(8, 32, 48), 7)], **SETTINGS)


def test_encoders_come_from_their_names_in_a_recipe() -> None:
    named = load_config(None, ["embedded"]).training["encoders"]
    autoencoder, text = encoders_by_name(named, create)
    assert isinstance(autoencoder, DctCodec)
    assert [type(t) for t in text] == [HashedWords, HashedPairs]
