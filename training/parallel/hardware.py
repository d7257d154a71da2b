"""Accelerators by name, a stated cluster of them, and how fast groups of workers exchange data in it.

Figures are the makers' data sheets: dense bf16 (not the doubled one with sparsity), and every link one way. What is really had
of them is said in `training.parallel.rates.ASSUMED`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from waver_core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Accelerator:
    """One device and the links of its node."""

    name: str
    memory_gib: float
    """As the driver tells it, which is less than on the box"""
    bf16_tflops: float
    """Dense matrix products, at most"""
    hbm_gb_s: float
    """To and from its own memory"""
    nvlink_gb_s: float
    """To the other devices of its node, one way"""
    network_gb_s: float
    """Its share of the node's network, one way"""
    host_gb_s: float
    """To or from host memory, one way"""
    gpus_per_node: int
    host_gib: float
    """Host memory for each device: what is usual for such a node, which its owner knows better"""


ACCELERATORS = {
    each.name: each
    for each in (
        Accelerator("A100", 79.3, 312, 2_039, 300, 25, 32, 8, 128),  # SXM, 80 GB; 200 Gb/s network
        Accelerator("H100", 79.6, 989, 3_350, 450, 50, 64, 8, 256),  # SXM; 400 Gb/s network
        Accelerator("H200", 140.4, 989, 4_800, 450, 50, 64, 8, 256),
        Accelerator("B200", 179.1, 2_250, 8_000, 900, 50, 64, 8, 256),
        Accelerator("L40S", 44.9, 362, 864, 32, 12.5, 32, 8, 64),  # no NVLink: the PCIe bus; 100 Gb/s network
        Accelerator("cpu", 4.0, 0.05, 10, 2, 1, 10, 64, 4),  # a worker with one core, fp32: an order of magnitude, no data sheet
    )
}


def accelerator_of(device_name: str) -> Accelerator | None:
    """The one that a driver's name of a device ("NVIDIA H200") tells of; None where it is not known."""
    words = device_name.upper().replace("-", " ").split()
    return next((each for each in ACCELERATORS.values() if each.name.upper() in words), None)


def accelerator(name: str) -> Accelerator:
    """By name, in capitals or not. Raises `UserError` with the nearest name."""
    found = {known.lower(): each for known, each in ACCELERATORS.items()}.get(name.lower())
    if found is None:
        raise UserError(f"no accelerator '{name}': {did_you_mean(name.upper(), ACCELERATORS)}")
    return found


@dataclass(frozen=True)
class Cluster:
    """So many workers with one accelerator each, neighbours in rank filling node after node."""

    workers: int
    accelerator: Accelerator

    def __str__(self) -> str:
        return f"{self.workers}x{self.accelerator.name}"

    def per_node(self, size: int, stride: int = 1) -> int:
        """Members in one node of a group of `size` workers that are `stride` ranks apart."""
        return max(1, min(size, self.accelerator.gpus_per_node // stride))

    def link(self, size: int, stride: int = 1) -> str:
        """What a group talks over: nothing, the links within a node, or the network."""
        if size == 1:
            return "none"
        return "node" if self.per_node(size, stride) == size else "network"

    def ring_gb_s(self, size: int, stride: int = 1, nvlink: float = 1.0, network: float = 1.0) -> float:
        """Bytes (in GB) that a member receives a second in an all-gather, reduce-scatter or all-reduce; the two factors say what
        is had of the links.

        Between nodes rings run side by side, one over the network card of each member in a node, and every ring crosses a
        node's border once. So a group with 8 members in each node gets 8 cards, up to what the links inside carry.
        """
        inside = self.accelerator.nvlink_gb_s * nvlink
        if self.link(size, stride) != "network":
            return inside
        return min(inside, self.accelerator.network_gb_s * network * self.per_node(size, stride))

    def all_to_all_s(self, payload_bytes: float, size: int, nvlink: float = 1.0, network: float = 1.0) -> float:
        """Seconds in which each of `size` neighbours sends `payload_bytes`, an equal part to each (its own stays); the two
        factors say what is had of the links. What goes to other nodes goes over the worker's own network card."""
        inside = self.per_node(size)
        near = payload_bytes * (inside - 1) / size / (self.accelerator.nvlink_gb_s * 1e9 * nvlink)
        far = payload_bytes * (size - inside) / size / (self.accelerator.network_gb_s * 1e9 * network)
        return max(near, far)


def cluster(text: str) -> Cluster:
    """`128xH100` -> 128 workers with an H100 each. Raises `UserError` that says how it is written."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*([A-Za-z][\w.-]*)\s*", text)
    if match is None or int(match[1]) < 1:
        raise UserError(f"--cluster '{text}' is no cluster: write workers x accelerator, for example 128xH100 or 4xcpu")
    return Cluster(int(match[1]), accelerator(match[2]))
