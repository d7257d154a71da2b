"""The network: a packed batch is its samples one by one, and every input matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from waver_core.dit import DiTConfig, WaverDiT
from waver_core.errors import UserError

RAGGED = ([(2, 4, 6), (1, 3, 5), (3, 4, 4)], [[2, 3], [1, 1], [4, 1]])
UNIFORM = ([(2, 4, 4)] * 3, [[2, 1]] * 3)


def velocities(model: WaverDiT, batch: Any) -> list[Tensor]:
    return model.velocity(*batch)[0]


def loss(outputs: list[Tensor]) -> Tensor:
    """A sum over samples with a weight for every number."""
    return sum((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in outputs)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * max(a.norm(), b.norm()))


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("lengths", [UNIFORM, RAGGED])
def test_a_packed_batch_is_its_samples_one_by_one_and_so_are_its_gradients(
    lengths: Any, windowed: bool, make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    model, batch = make_model(windowed=windowed), make_batch(*lengths)
    together = velocities(model, batch)
    assert [v.shape for v in together] == [(16, *x.shape[1:]) for x in batch.latents]
    loss(together).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert packed.keys() == dict(model.named_parameters()).keys()

    model.zero_grad()
    for i, ours in enumerate(together):
        (alone,) = velocities(model, batch.only(i))
        assert near(ours, alone)
        loss([alone]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.norm() > 0, name
        assert near(packed[name], p.grad), name


def test_the_order_of_samples_changes_nothing(make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]) -> None:
    model, batch = make_model(), make_batch(*RAGGED)
    order = [2, 0, 1]
    moved = velocities(model, ([batch.latents[i] for i in order], [batch.texts[i] for i in order], batch.timesteps[order]))
    for i, ours in zip(order, moved):
        assert near(ours, velocities(model, batch)[i])


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("lengths", [UNIFORM, RAGGED])
def test_a_sample_does_not_depend_on_its_neighbours(
    lengths: Any, windowed: bool, make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    model, batch = make_model(windowed=windowed), make_batch(*lengths)
    inputs = [x.requires_grad_() for x in batch.latents]
    texts = [t.requires_grad_() for sample in batch.texts for t in sample]
    batch.timesteps.requires_grad_()
    for i, out in enumerate(velocities(model, batch)):
        found = torch.autograd.grad(out.sum(), [*inputs, *texts, batch.timesteps], retain_graph=True)
        for j, grad in enumerate(found[:3]):
            assert bool(grad.any()) == (i == j)
        for j, grad in enumerate(found[3:-1]):
            assert bool(grad.any()) == (i == j // 2)
        assert [bool(g) for g in found[-1]] == [i == j for j in range(3)]


def test_a_new_model_predicts_zero_and_its_blocks_are_identities(make_batch: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = WaverDiT(DiTConfig(2, 3, 2, 16, text_dims=(6, 10), max_grid=(4, 6, 6)))
    batch = make_batch(*RAGGED)
    outputs, first = model.velocity(*batch, tap=1)
    assert not any(v.any() for v in outputs)
    last = model.velocity(*batch, tap=5)[1]
    assert first is not None and last is not None and torch.equal(first, last) and first.any()
    loss(outputs).backward()
    assert model.video_out.weight.grad is not None and model.video_out.weight.grad.any()


@pytest.mark.parametrize("block", range(1, 6))
def test_what_is_tapped_is_the_video_after_that_block(
    block: int, make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    model, batch = make_model(), make_batch(*RAGGED)
    seen: list[Tensor] = []
    blocks = [*model.dual_blocks, *model.single_blocks]
    blocks[block - 1].register_forward_hook(lambda m, args, out: seen.append(out[1] if isinstance(out, tuple) else out))
    outputs, tapped = model.velocity(*batch, tap=block)
    assert tapped is not None and tapped.shape == (2 * 2 * 3 + 2 * 3 + 3 * 2 * 2, 32)
    if block > 2:  # joint tokens: each sample's text stands before its video
        joint, videos = seen[0], []
        for n_text, n_video in ((5, 12), (2, 6), (5, 12)):
            videos.append(joint[n_text : n_text + n_video])
            joint = joint[n_text + n_video :]
        seen = [torch.cat(videos)]
    assert torch.equal(tapped, seen[0])
    for ours, plain in zip(outputs, velocities(model, batch)):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("block", [0, -1, 6])
def test_a_block_that_is_not_there_cannot_be_tapped(
    block: int, make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=f"block {block} of 5 cannot be tapped"):
        make_model().velocity(*make_batch(*RAGGED), tap=block)


def test_windows_are_full_attention_where_a_window_holds_everything_and_else_are_not(
    make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    full, windowed = make_model(), make_model(windowed=True)
    covered = make_batch([(1, 2, 2), (1, 2, 2)], [[2, 1], [1, 3]])
    for a, b in zip(velocities(full, covered), velocities(windowed, covered)):
        assert near(a, b)
    cut = make_batch([(2, 4, 4)], [[2, 1]])
    assert not near(velocities(full, cut)[0], velocities(windowed, cut)[0], 1e-3)


def test_with_every_block_full_a_windowed_model_is_the_base_model(
    make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    batch = make_batch(*RAGGED)
    for a, b in zip(velocities(make_model(), batch), velocities(make_model(windowed=True, full_blocks=3), batch)):
        assert torch.equal(a, b)


def test_timestep_text_condition_and_mask_matter(make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]) -> None:
    model, batch = make_model(), make_batch([(2, 4, 4)], [[3, 3]])
    (plain,) = velocities(model, batch)
    (later,) = velocities(model, batch._replace(timesteps=batch.timesteps + 0.01))
    assert not near(plain, later, 1e-3)
    for encoder in range(2):
        texts = [tuple(t.flip(1) if e == encoder else t for e, t in enumerate(batch.texts[0]))]
        assert not near(plain, velocities(model, batch._replace(texts=texts))[0], 1e-3)
    for channel in (0, 15, 16, 31, 32, 35):
        changed = batch.latents[0].clone()
        changed[channel] += 1
        assert not near(plain, velocities(model, batch._replace(latents=[changed]))[0], 1e-3)


def test_text_tokens_have_no_order_of_their_own_but_their_encoder(
    make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    """Order is in the encoders' vectors. Which encoder a token comes from is told by its projection and origin."""
    model, batch = make_model(text_dims=(6, 6)), make_batch([(2, 4, 4)], [[3, 3]])
    first, second = batch.texts[0][0], batch.texts[0][1][:, :6]
    plain = velocities(model, batch._replace(texts=[(first, second)]))[0]
    assert near(plain, velocities(model, batch._replace(texts=[(first[[2, 0, 1]], second)]))[0])
    assert not near(plain, velocities(model, batch._replace(texts=[(second, first)]))[0], 1e-3)


@pytest.mark.parametrize("streams", [(3, 0), (0, 3)])
def test_pure_streams_run_and_learn(
    streams: tuple[int, int], make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    model, batch = make_model(dual_blocks=streams[0], single_blocks=streams[1]), make_batch(*RAGGED)
    together = velocities(model, batch)
    for i, ours in enumerate(together):
        assert near(ours, velocities(model, batch.only(i))[0])
    loss(together).backward()
    idle = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is None}
    assert idle <= {"text"}  # nothing reads the text after the last dual block


def test_one_text_encoder_is_enough(make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]) -> None:
    model, batch = make_model(text_dims=(6,)), make_batch(*RAGGED)
    batch = batch._replace(texts=[text[:1] for text in batch.texts])
    for i, ours in enumerate(velocities(model, batch)):
        assert near(ours, velocities(model, batch.only(i))[0])


def test_grids_beyond_the_position_tables_are_refused(
    make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    model = make_model()
    velocities(model, make_batch([(4, 12, 11)], [[1, 1]]))
    for shape in ((5, 2, 2), (1, 13, 2), (1, 2, 14)):
        with pytest.raises(UserError, match="shorten or shrink the video"):
            velocities(model, make_batch([shape], [[1, 1]]))


def test_half_precision_weights_take_fp32_inputs_and_keep_timesteps(
    make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    batch = make_batch(*RAGGED)
    model = make_model()
    wanted = velocities(model, batch)
    seen: list[Tensor] = []
    half = make_model().bfloat16()
    half.time_in.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for ours, exact in zip(velocities(half, batch), wanted):
        assert ours.dtype == torch.bfloat16
        assert near(ours.float(), exact, 0.1)
    velocities(half, batch._replace(timesteps=torch.tensor([0.999, 0.9995, 0.9999])))
    assert (seen[1].float().diff(dim=0).abs().amax(1) > 0.05).all()  # bf16 timesteps would all be 1


def test_autocast_gives_what_fp32_gives_to_a_few_digits(
    make_model: Callable[..., WaverDiT], make_batch: Callable[..., Any]
) -> None:
    model, batch = make_model(windowed=True), make_batch(*RAGGED)
    wanted = velocities(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = velocities(model, batch)
    for ours, exact in zip(outputs, wanted):
        assert near(ours.float(), exact, 0.1)
