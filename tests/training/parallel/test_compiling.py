"""Every block as one graph: the same gradients, few graphs, and a graph that breaks is an error."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.parallel import compiling
from training.parallel.checkpointing import Mode, checkpoint_block, kept_ops
from training.parallel.compiling import compile_block, warm_up_report
from training.parallel.offload import Offload
from waver_core.dit import DiTConfig
from waver_core.errors import UserError


@pytest.fixture(autouse=True)
def fresh(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_watch", None)


def compiled(tiny: Any, config: DiTConfig | None = None, modes: tuple[Mode, ...] = ("none",), **settings: Any) -> Any:
    model = tiny.model(config)
    for i, block in enumerate(tiny.blocks(model)):
        checkpoint_block(block, modes[i % len(modes)], kept_ops("cpu", torch.float32, 16))
        compile_block(block, **{"backend": "aot_eager", **settings})
    return model


def test_before_any_block_there_is_nothing_to_report() -> None:
    assert warm_up_report() == {"graphs": 0, "seconds": 0.0, "recompiles": 0}


@pytest.mark.slow
@pytest.mark.timeout(400)  # the C++ compiler, on shared cores
def test_inductor_gives_the_same_gradients_with_selective_checkpointing_and_offload(tiny: Any) -> None:
    assert shutil.which("g++"), "inductor needs a C++ compiler: install g++, or the real backend goes untested"
    config = DiTConfig(0, 2, heads=2, head_dim=16, text_dims=(8, 12), max_grid=(8, 16, 16))  # one graph: g++ is slow
    plain, batch = tiny.model(config), tiny.batch("equal")
    model, offload = compiled(tiny, config, ("selective",), backend="inductor"), Offload("cpu", 64)
    for block in tiny.blocks(model):
        offload.wrap(block)
    for _ in range(2):
        assert tiny.difference(tiny.gradients(model, batch), tiny.gradients(plain, batch)) <= 1e-5
    assert offload.moved_bytes > 0
    report = warm_up_report()
    assert report["graphs"] == 1 and report["recompiles"] == 0 and report["seconds"] > 0.1


def test_blocks_of_a_kind_share_a_graph_and_other_lengths_take_one_more(tiny: Any) -> None:
    model = compiled(tiny, DiTConfig(0, 3, heads=2, head_dim=16, text_dims=(8, 12), max_grid=(8, 16, 16)))
    shapes = [[(2, 8, 12)], [(3, 8, 12)], [(4, 10, 12)], [(5, 6, 8)]]
    counts = []
    for shape in shapes:
        tiny.loss(model, tiny.batch(shapes=shape)).backward()
        counts.append(warm_up_report()["graphs"])
    assert counts[0] == 1 and counts[1] == counts[2] == counts[3] <= 3  # the first block may get a view where others do not
    assert warm_up_report()["recompiles"] == counts[-1] - 1


@pytest.mark.slow
def test_any_number_of_packs_takes_few_graphs(tiny: Any) -> None:
    config = DiTConfig(1, 1, heads=2, head_dim=16, text_dims=(8, 12), max_grid=(8, 16, 16))
    model, plain = compiled(tiny, config), tiny.model(config)
    packs = [[(3, 8, 8), (1, 8, 8), (2, 6, 10)], [(2, 8, 8), (3, 4, 8)], [(1, 4, 4), (2, 4, 6), (1, 6, 4), (5, 4, 4)]]
    packs += [[(2, 4, 8), (4, 8, 8)], [(1, 8, 8), (1, 6, 6), (1, 4, 4), (1, 4, 6), (1, 6, 8)]]
    counts = []
    for pack in packs:
        batch = tiny.batch(shapes=pack)
        assert tiny.difference(tiny.gradients(model, batch), tiny.gradients(plain, batch)) <= 1e-5
        counts.append(warm_up_report()["graphs"])
    assert counts[-1] == counts[-2] <= 6


def test_a_graph_that_breaks_is_an_error() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x * 2

    block = Breaks()
    compile_block(block, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        block(torch.rand(3))


def test_names_and_types_stay(tiny: Any) -> None:
    plain, changed = tiny.model(), compiled(tiny)
    assert list(plain.state_dict()) == list(changed.state_dict())
    assert [type(b) for b in tiny.blocks(plain)] == [type(b) for b in tiny.blocks(changed)]


def test_without_a_compiler_it_says_what_to_install(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"C\+\+ compiler .*install g\+\+, or set parallel.compile to false"):
        compile_block(tiny.model().single_blocks[0])
