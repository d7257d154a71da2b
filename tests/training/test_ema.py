"""The average of the weights: its formula, its warm-up, and that a swap leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.ema import Ema
from waver_core.weights import plain_name


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_the_formula_in_fp32(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    ema = Ema(model, 0.9)
    expected = {k: v.double() for k, v in weights(model).items()}
    for step in range(1, 200):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        ema.update(model, step)
        d = min(0.9, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    for name, value in ema.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=2e-6)


def test_the_decay_warms_up_and_starts_from_the_weights() -> None:
    model = network()
    ema = Ema(model, 0.9999)
    assert same(ema.state_dict(), weights(model))
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(90) == pytest.approx(0.91)
    assert ema.decay_at(10**9) == 0.9999
    with pytest.raises(ValueError, match="decay"):
        Ema(model, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_computes_with_the_average_and_restores_every_bit(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    ema = Ema(model, 0.9)
    other = network(1, dtype)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.copy_(q)
    ema.update(model, 50)
    before = weights(model), {k: v.clone() for k, v in ema.state_dict().items()}
    with ema.swapped(model):
        assert same(weights(model), {k: v.to(dtype) for k, v in before[1].items()})
        for use in (ema.state_dict, lambda: ema.update(model, 1)):  # neither may mistake one for the other
            with pytest.raises(RuntimeError, match="leave `swapped` first"):
                use()
    assert same(weights(model), before[0])
    assert same(ema.state_dict(), before[1])


def test_swapped_restores_after_an_error() -> None:
    model = network()
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = weights(model)
    with pytest.raises(KeyError), ema.swapped(model):
        raise KeyError("sampling failed")
    assert same(weights(model), before)


def test_names_are_those_of_the_plain_model() -> None:
    assert plain_name("_orig_mod.blocks.0._checkpoint_wrapped_module.mlp.weight") == "blocks.0.mlp.weight"
    model = network()
    assert set(Ema(torch.compile(model), 0.9).state_dict()) == set(weights(model))
