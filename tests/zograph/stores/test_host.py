from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from zograph.errors import StoreError
from zograph.parameters import parameter_table
from zograph.stores import host
from zograph.stores.base import LARGE, PAGE, padded, page_aligned
from zograph.stores.host import HostStore
from zograph.stores.pinned import pin
from zograph.stores.source import as_tensor


class FakeCuda:
    """Registers memory as CUDA does, up to a limit."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit = limit
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert pointer % PAGE == 0
        assert flags == 0
        if size == 0:
            return 1
        if sum(self.pinned.values()) + size > self.limit:
            return 2
        self.pinned[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.pinned[pointer]
        return 0


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 7)).to(torch.float32)


def test_round_trip_in_place() -> None:
    net = model()
    table = parameter_table(net)
    store = HostStore(net.get_parameter, table)
    info = table["0.weight"]
    buffer = page_aligned(padded(info.bytes))
    assert store.read("0.weight", buffer) == info.bytes
    place = as_tensor(info, buffer)
    assert torch.equal(place, net.get_parameter("0.weight"))
    place.mul_(2)
    assert store.write("0.weight", buffer, 5) == info.bytes
    assert torch.equal(net.get_parameter("0.weight"), place)
    assert store.fold_steps() == {"0.weight": 5, "0.bias": 0, "1.weight": 0, "1.bias": 0}
    tensor = store.tensor("0.weight")
    assert tensor.data_ptr() == net.get_parameter("0.weight").data_ptr()
    assert not tensor.requires_grad
    store.close()


def test_replaced_parameters_are_seen() -> None:
    net = model()
    store = HostStore(net.get_parameter, parameter_table(net))
    net[0].bias = nn.Parameter(torch.ones(50))
    assert torch.equal(store.tensor("0.bias"), torch.ones(50))


def test_pinned_slab_has_its_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHUNK", 2 * PAGE)
    net, cuda = model(), FakeCuda()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    table = parameter_table(net)
    store = HostStore(net.get_parameter, table, pinned=True, cudart=cuda)
    assert sum(cuda.pinned.values()) == sum(padded(p.bytes) for p in table.values())
    assert len(cuda.pinned) > 1
    for name, p in net.named_parameters():
        start = p.data_ptr()
        assert start % PAGE == 0
        assert torch.equal(p, before[name])
        held = [a for a, n in cuda.pinned.items() if a <= start and start + p.nbytes <= a + n]
        assert len(held) == 1, "a parameter must lie within one registration"
    store.close()
    store.close()
    assert not cuda.pinned
    assert torch.equal(net.get_parameter("1.bias"), before["1.bias"])


def test_refused_pinning_leaves_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHUNK", PAGE)
    limits = (1 << 12, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    net, cuda = model(), FakeCuda(limit=2 * PAGE)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(StoreError, match=r"may lock 4096 bytes. Raise the limit .*ulimit -l"):
        HostStore(net.get_parameter, parameter_table(net), pinned=True, cudart=cuda)
    assert not cuda.pinned
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_refused_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    with pytest.raises(StoreError, match=r"error 2.*Free host memory"):
        pin(page_aligned(PAGE), FakeCuda(limit=0))


def test_nothing_to_pin() -> None:
    assert pin(page_aligned(0), FakeCuda()).nbytes == 0


def test_pinning_ends_with_its_handle() -> None:
    cuda = FakeCuda()
    held = pin(page_aligned(3 * PAGE), cuda)
    assert held.nbytes == 3 * PAGE
    del held
    assert not cuda.pinned


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages"
)
@pytest.mark.parametrize(("nbytes", "huge"), [(LARGE, True), (LARGE - PAGE, False)])
def test_large_buffers_are_of_huge_pages(nbytes: int, huge: bool) -> None:
    buffer = page_aligned(nbytes)
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(place[1], 16) <= buffer.data_ptr() < int(place[2], 16)
        elif found and line.startswith("VmFlags:"):
            assert ("hg" in line.split()) == huge
            return
    pytest.fail("no mapping holds the buffer")
