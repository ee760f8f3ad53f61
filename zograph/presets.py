"""Devices known from public datasheets, for plans on paper.

Assumed everywhere: 0.65 of the dense matrix rate and 0.85 of the memory bandwidth are achieved.
Memory is the datasheet's decimal gigabytes; a card holds a few per cent more, which a CUDA
context needs. Noise and folds take their float16 traffic and their integer arithmetic one after
the other, 100 instructions an element; docs/noise.md adds up to some 60.

The slow link is the one that the card has: PCIe 4.0 x16, 25 of 31.5 GB/s each way, or PCIe 5.0
x16, 50 of 63. The fast one is the next generation, twice as fast, which none of these cards has:
a what-if. Both are full duplex.

The host has 512 GB of RAM and one PCIe 4.0 x4 drive of 7 GB/s reading and 5 GB/s writing (Samsung
980 PRO 1 TB datasheet); when both run at once, equal bytes take turns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from zograph.options import one_of

LINKS = ("slow", "fast")
GEMM_FRACTION = 0.65
BANDWIDTH_FRACTION = 0.85
NOISE_INSTRUCTIONS = 100
HOST_MEMORY = 512_000_000_000
READ, WRITE = 7e9, 5e9


class Card(NamedTuple):
    """Peaks of one card."""

    memory: int
    """Bytes."""
    tensor: float
    """Dense FLOP/s of float16 and bfloat16 with float32 accumulation."""
    single: float
    """FLOP/s of float32, TF32 off."""
    bandwidth: float
    """Bytes/s."""
    integer: float
    """32-bit integer instructions/s: multiprocessors x 64 lanes x boost clock."""
    link: float
    """Bytes/s of the slow link, one direction."""


CARDS = {
    # NVIDIA Ada GPU Architecture whitepaper; 128 multiprocessors, 2.52 GHz; PCIe 4.0.
    "rtx4090-24gb": Card(24_000_000_000, 165.2e12, 82.6e12, 1.008e12, 20.6e12, 25e9),
    # NVIDIA A100 Tensor Core GPU datasheet, SXM; 108 multiprocessors, 1.41 GHz; PCIe 4.0.
    "a100-40gb": Card(40_000_000_000, 312e12, 19.5e12, 1.555e12, 9.75e12, 25e9),
    "a100-80gb": Card(80_000_000_000, 312e12, 19.5e12, 2.039e12, 9.75e12, 25e9),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM, whose tensor rate counts sparsity, twice the
    # dense one; 132 multiprocessors, 1.98 GHz; PCIe 5.0.
    "h200": Card(141_000_000_000, 989.5e12, 67e12, 4.8e12, 16.7e12, 50e9),
}


def preset_fields(name: str, link: str) -> dict[str, Any]:
    """Return the fields of :class:`zograph.device.DeviceSpec` for a card behind a link.

    Raises
    ------
    OptionError
        If the name or the link is unknown.
    """
    one_of("preset", name, tuple(CARDS))
    one_of("link", link, LINKS)
    card = CARDS[name]
    half = GEMM_FRACTION * card.tensor
    bandwidth = BANDWIDTH_FRACTION * card.bandwidth
    arithmetic = NOISE_INSTRUCTIONS / card.integer
    rate = card.link * (2 if link == "fast" else 1)
    return {
        "name": f"{name}, {link} link",
        "kind": "cuda",
        "memory": card.memory,
        "host_memory": HOST_MEMORY,
        "gemm": {"float32": GEMM_FRACTION * card.single, "bfloat16": half, "float16": half},
        "bandwidth": bandwidth,
        "noise": 1 / (6 / bandwidth + arithmetic),  # reads 2 bytes, writes 2 x 2
        "fold": 1 / (4 / bandwidth + arithmetic),  # reads 2 bytes, writes 2
        "to_device": rate,
        "to_host": rate,
        "link_both": 2 * rate,
        "read": READ,
        "write": WRITE,
        "disk_both": 2 / (1 / READ + 1 / WRITE),
    }
