"""Clusters from text, and which link a group of workers gets."""

from __future__ import annotations

import pytest

from training.parallel.hardware import ACCELERATORS, Cluster, accelerator, cluster
from waver_core.errors import UserError


def test_a_cluster_from_text() -> None:
    assert cluster("128xH100") == Cluster(128, ACCELERATORS["H100"])
    assert cluster(" 8 x h200 ") == Cluster(8, ACCELERATORS["H200"])
    assert str(cluster("4xCPU")) == "4xcpu"


@pytest.mark.parametrize("text", ["", "H100", "128", "x", "0xH100", "-8xH100", "8xH100,8xH100", "8.5xH100", "eight x H100"])
def test_no_cluster(text: str) -> None:
    with pytest.raises(UserError, match="for example 128xH100"):
        cluster(text)


@pytest.mark.parametrize(("name", "near"), [("H10", "'H100'"), ("h20", "'H200'"), ("b20", "'B200'"), ("TPU", "known: A100")])
def test_an_unknown_accelerator(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"no accelerator '{name}'") as error:
        accelerator(name)
    assert near in str(error.value)


def test_figures_are_dense_and_one_way() -> None:
    for each in ACCELERATORS.values():
        assert each.network_gb_s <= each.nvlink_gb_s <= each.hbm_gb_s and each.host_gb_s <= each.hbm_gb_s
    assert accelerator("H200").bf16_tflops == accelerator("H100").bf16_tflops < 1000  # 1,979 is with sparsity
    assert accelerator("H200").nvlink_gb_s == 450  # 900 is both ways


def test_links_follow_nodes() -> None:
    many = cluster("128xH100")
    assert [many.link(1), many.link(8), many.link(16), many.link(2, stride=4), many.link(2, stride=8)] == [
        "none",
        "node",
        "network",
        "node",
        "network",
    ]
    assert many.ring_gb_s(8) == 450
    # Eight cards of 50 GB/s in each node serve one ring of all; replicas of a node's shards have a card each.
    assert many.ring_gb_s(64) == 400
    assert many.ring_gb_s(16, stride=8) == 50
    assert many.ring_gb_s(8, stride=4) == 100


def test_all_to_all_by_hand() -> None:
    many = cluster("128xH100")
    # Of 9 GB in a group of 8, an eighth stays and seven eighths pass the links of the node.
    assert many.all_to_all_s(9e9, 8) == pytest.approx(9 * 7 / 8 / 450)
    # In a group of 24 in three nodes, 16 of 24 parts go over the worker's card.
    assert many.all_to_all_s(9e9, 24, network=0.5) == pytest.approx(9 * 16 / 24 / 25)
    assert many.all_to_all_s(9e9, 1) == 0
