"""The materialize ops, the fold and the pool behind them."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zograph import kernels
from zograph.kernels import tiles
from zograph.noise import DISTRIBUTIONS, noise_at, parameter_key, stream_words
from zograph.ops import fold_
from zograph.pool import Pool, pool

OPS = torch.ops.zograph
KEYS = torch.tensor([[17, 0], [parameter_key("a.weight"), 0], [-5, 0]])
SLOT = 1
KEY = KEYS[SLOT, 0]
SEED, EPS = torch.tensor(2**40 + 3), torch.tensor(1e-3)
PROBE = (KEYS, SLOT, SEED, EPS, "normal")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def terms(r: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(r)
    coefs = torch.randn(r, generator=g) * 1e-2
    return torch.arange(r) * 7 - 3, coefs, 1 - coefs.square()


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def tail(r: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, ...]:
    """Every argument after `base` (and `index`)."""
    distribution, decay = options.get("distribution", "normal"), options.get("decay", True)
    return (*terms(r), KEYS, SLOT, SEED, EPS, dtype, distribution, decay)


def reference(
    base: Tensor, r: int, dtype: torch.dtype, distribution: str = "normal", decay: bool = True
) -> tuple[Tensor, Tensor]:
    """The op, written out as plainly as its definition."""
    index = torch.arange(base.numel()).view(base.shape)
    w = base if base.dtype == torch.float64 else base.to(torch.float32)
    work = w.dtype

    def z(seed: Tensor) -> Tensor:
        return noise_at(index, stream_words(seed, KEY), distribution).to(work)

    for seed, coef, scale in zip(*terms(r), strict=True):
        w = (scale.to(work) * w if decay else w) + coef.to(work) * z(seed)
    w = w.to(base.dtype).to(work)
    d = EPS.to(work) * z(SEED)
    return (w + d).to(dtype), (w - d).to(dtype)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtypes", [*itertools.product(FLOATS, FLOATS)], ids=str)
def test_equals_reference(dtypes: tuple[torch.dtype, torch.dtype], distribution: str) -> None:
    base = weight(61, 241, dtype=dtypes[0])  # several tiles; with terms, several threads
    for r, decay in ((0, True), (1, False), (3, True)):
        found = OPS.materialize(base, *tail(r, dtypes[1], distribution=distribution, decay=decay))
        assert same(found, reference(base, r, dtypes[1], distribution, decay))


def test_float64() -> None:
    base = weight(50, 3, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        assert same(OPS.materialize(base, *tail(2, dtype)), reference(base, 2, dtype))
    assert same(
        OPS.materialize(weight(9), *tail(1, torch.float64)), reference(weight(9), 1, torch.float64)
    )


def test_the_reference_notices_one_bit() -> None:
    base = weight(1000)
    plus, minus = OPS.materialize(base, *tail(1))
    plus[7] = torch.nextafter(plus[7], torch.tensor(9.0))
    assert not same((plus, minus), reference(base, 1, torch.float32))


def test_ten_million_elements_in_two_engines() -> None:
    """C++ and the definition: one answer."""
    r = 1
    base = weight(10_000_001)
    found = OPS.materialize(base, *tail(r))
    plus, minus = torch.empty_like(base), torch.empty_like(base)
    tiles.perturb(base, None, plus, minus, terms(r), *PROBE)
    assert same(found, (plus, minus))
    assert torch.equal(OPS.materialize_one(base, *tail(r), 1), found[0])
    assert torch.equal(OPS.materialize_one(base, *tail(r), -1), found[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("r", [0, 2])
def test_one_branch_is_half_of_the_pair(dtype: torch.dtype, r: int) -> None:
    base, index = weight(70, 1000, dtype=dtype), torch.tensor([[3, 3], [69, 0]])
    pair, rows = OPS.materialize(base, *tail(r)), OPS.materialize_rows(base, index, *tail(r))
    for sign, k in ((1, 0), (-1, 1)):
        assert torch.equal(OPS.materialize_one(base, *tail(r), sign), pair[k])
        assert torch.equal(OPS.materialize_rows_one(base, index, *tail(r), sign), rows[k])


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_rows_equal_rows_of_the_whole(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    base = weight(300, 5, 41, dtype=dtype)
    index = torch.tensor([[5, 299, 0], [5, 17, 5]], dtype=index_dtype)
    for r, out in itertools.product((0, 2), FLOATS):
        whole = OPS.materialize(base, *tail(r, out))
        rows = OPS.materialize_rows(base, index, *tail(r, out))
        assert rows[0].shape == (2, 3, 5, 41)
        assert same(rows, (whole[0][index.long()], whole[1][index.long()]))
        plus, minus = torch.empty_like(rows[0]), torch.empty_like(rows[1])
        tiles.perturb(base, index, plus, minus, terms(r), *PROBE)
        assert same(rows, (plus, minus))


@needs_kernels
def test_rows_past_two_to_the_32() -> None:
    """A table of over 2^32 elements, of which only three rows are ever touched."""
    width = 300_000
    base = torch.empty(15_000, width, dtype=torch.bfloat16)  # pages never written
    index = torch.tensor([14316, 14317, 14999])  # 14316 * 3e5 < 2^32 < 14317 * 3e5
    base[index] = 0
    one = torch.tensor(1.0)
    plus, _ = OPS.materialize_rows(
        base, index, *terms(0), KEYS, SLOT, SEED, one, torch.float32, "normal", True
    )
    words = stream_words(SEED, KEY)
    for k, row in enumerate(index.tolist()):
        z = noise_at(torch.arange(row * width, (row + 1) * width), words, "normal")
        assert torch.equal(plus[k], z)


@pytest.mark.parametrize("bad", [-1, 4])
@pytest.mark.parametrize("native", [True, False])
def test_rows_out_of_range(bad: int, native: bool) -> None:
    dtype = torch.float32 if native else torch.float64
    with pytest.raises(IndexError, match=rf"row index {bad} is out of range.* 4 rows"):
        OPS.materialize_rows(weight(4, 3, dtype=dtype), torch.tensor([0, bad]), *tail())


@pytest.mark.parametrize("decay", [True, False])
def test_pending_terms_equal_folds(decay: bool) -> None:
    """r terms at once = r folds of one term, in C++ and in torch; a narrow base folds to w."""
    base, key = weight(33_457), int(KEY)
    pending = OPS.materialize(base, *tail(4, decay=decay))
    folded, tiled, once = base.clone(), base.clone(), base.clone()
    for j in range(4):
        one = tuple(t[j : j + 1] for t in terms(4))
        fold_(folded, *one, key, decay=decay)
        scales = one[2] if decay else None
        tiles.fold(tiled, (one[0], one[1], scales), key, "normal")
    fold_(once, *terms(4), KEY, decay=decay)
    assert torch.equal(folded, tiled)
    assert torch.equal(folded, once)
    assert not torch.equal(folded, base)
    assert same(OPS.materialize(folded, *tail(0)), pending)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_unfolded_equals_folded_in_every_base_dtype(dtype: torch.dtype) -> None:
    base = weight(10_001, dtype=dtype)
    pending = OPS.materialize(base, *tail(3))
    fold_(base, *terms(3), int(KEY))
    assert same(OPS.materialize(base, *tail(0)), pending)


def test_fold_on_leaf_parameters_and_strided_bases() -> None:
    parameter = torch.nn.Parameter(weight(30, 40))
    expected = parameter.detach().clone()
    version, pointer = parameter._version, parameter.data_ptr()
    fold_(parameter, *terms(2), 9)
    fold_(expected, *terms(2), 9)
    assert torch.equal(parameter.detach(), expected)
    assert (parameter._version, parameter.data_ptr()) == (version, pointer)
    assert parameter.requires_grad
    strided = weight(30, 40).t().contiguous().t()
    fold_(strided, *terms(2), 9)
    assert not strided.is_contiguous()
    assert torch.equal(strided, expected)


def test_strided_base_counts_in_row_major_order() -> None:
    base = weight(64, 48)
    strided = base.t().contiguous().t()
    index = torch.tensor([1, 5])
    assert same(OPS.materialize(strided, *tail(1)), OPS.materialize(base, *tail(1)))
    assert OPS.materialize(strided, *tail(1))[0].is_contiguous()
    rows = OPS.materialize_rows(strided, index, *tail(1))
    assert same(rows, OPS.materialize_rows(base, index, *tail(1)))


def test_special_values() -> None:
    base = torch.tensor([float("nan"), float("inf"), -float("inf"), 65519.0, 65521.0, 6e-8, 3e38])
    for dtype in FLOATS:
        plus, _ = OPS.materialize(base, *tail(0, dtype))
        expected, _ = reference(base, 0, dtype)
        assert torch.equal(plus.nan_to_num(1.5), expected.nan_to_num(1.5))
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    nothing = torch.tensor(0.0)
    for narrow in (torch.float16, torch.bfloat16):
        base = every.view(narrow)
        args = (*terms(0), KEYS, SLOT, SEED, nothing)
        wide, _ = OPS.materialize(base, *args, torch.float32, "normal", True)
        assert torch.equal(wide.nan_to_num(1.5), base.float().nan_to_num(1.5))
        back, _ = OPS.materialize(wide, *args, narrow, "normal", True)
        assert torch.equal(back.nan_to_num(1.5), base.nan_to_num(1.5))


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (4095,), (4097,), (32769,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    base = weight(*shape)
    assert same(OPS.materialize(base, *tail(1)), reference(base, 1, torch.float32))


def test_errors() -> None:
    base, empty = weight(4), torch.empty(0)
    none = torch.empty(0, dtype=torch.int64)
    rest = (torch.float32, "normal", True)
    with pytest.raises(ValueError, match="unknown distribution 'levy'"):
        OPS.materialize(base, *tail(distribution="levy"))
    with pytest.raises(ValueError, match="int64, float32"):
        OPS.materialize(base, none, empty.double(), empty, KEYS, 0, SEED, EPS, *rest)
    with pytest.raises(ValueError, match="slot 3"):
        OPS.materialize(base, none, empty, empty, KEYS, 3, SEED, EPS, *rest)
    with pytest.raises(ValueError, match="2 seeds but 0 coefs"):
        OPS.materialize(base, KEYS[:2, 0], empty, empty, KEYS, 0, SEED, EPS, *rest)
    with pytest.raises(ValueError, match=r"scales must be float32\[2\]"):
        fold_(base, KEYS[:2, 0], torch.zeros(2), empty, 1)
    with pytest.raises(ValueError, match="sign"):
        OPS.materialize_one(base, *tail(), 2)
    with pytest.raises(ValueError, match="must be floating"):
        OPS.materialize(KEYS, *tail())


def test_registration_and_compile() -> None:
    base, index = weight(6, 5), torch.tensor([1, 1])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.materialize.default, (base, *tail(1)), test_utils=tests)
    torch.library.opcheck(OPS.materialize_one.default, (base, *tail(1), -1), test_utils=tests)
    torch.library.opcheck(OPS.materialize_rows.default, (base, index, *tail(1)), test_utils=tests)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(base).t()
        out, _ = OPS.materialize(fake, *map(_faked(mode), tail(1, torch.bfloat16)))
        assert (out.shape, out.dtype, out.stride()) == ((5, 6), torch.bfloat16, (6, 1))

    rest = tail(1)

    def body(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        plus, minus = OPS.materialize(w, *rest)
        return torch.relu(x @ plus) + 1, torch.relu(x @ minus) + 1

    x, w = weight(8, 256), weight(256, 256)
    eager = body(x, w)
    compiled = torch.compile(body, fullgraph=True)
    kept = [compiled(x, w) for _ in range(4)]
    for pair in kept:
        torch.testing.assert_close(pair, eager, rtol=1e-6, atol=1e-6)


def _faked(mode: FakeTensorMode) -> Any:
    return lambda a: mode.from_tensor(a) if isinstance(a, Tensor) else a


def test_no_openmp_runtime_beside_torchs() -> None:
    if not kernels.available() or not sys.platform.startswith("linux"):
        pytest.skip("no C++ kernels, or no /proc")
    script = (
        "import torch; from zograph import kernels; assert kernels.available();"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"


def test_without_kernels_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    base, index = weight(70, 100), torch.tensor([4, 2])
    native = OPS.materialize(base, *tail(2)), OPS.materialize_rows(base, index, *tail(2))
    folded = base.clone()
    fold_(folded, *terms(2), 3)
    monkeypatch.setattr(kernels, "_library", None)
    monkeypatch.setattr(kernels, "_reason", "switched off by the test")
    with pytest.warns(RuntimeWarning, match="switched off by the test"):
        assert not kernels.available(warn=True)
    assert same(OPS.materialize(base, *tail(2)), native[0])
    assert same(OPS.materialize_rows(base, index, *tail(2)), native[1])
    fold_(base, *terms(2), 3)
    assert torch.equal(base, folded)


# ---- the pool --------------------------------------------------------------------------------


def test_pool_recycles_dead_memory() -> None:
    own = Pool()
    first = own.empty((300, 1000), torch.float32)
    pointer, held = first.data_ptr(), own.bytes
    assert pointer % 64 == 0
    assert held == 1_200_128  # whole pages
    del first
    assert own.empty((300_000,), torch.float32).data_ptr() == pointer
    assert own.bytes == held


def test_pool_never_hands_out_live_memory() -> None:
    own = Pool()
    first = own.empty((300, 1000), torch.float32)
    pointer, view, array = first.data_ptr(), first[1:, ::2], first.numpy()
    del first
    assert own.empty((300, 1000), torch.float32).data_ptr() != pointer
    del view
    assert own.empty((300, 1000), torch.float32).data_ptr() != pointer
    del array
    pointers = {own.empty((300, 1000), torch.float32).data_ptr() for _ in range(3)}
    assert pointer in pointers  # the control: once dead, it is found


def test_pool_negative_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the use count ignored, the test above would see live memory again."""
    monkeypatch.setattr("zograph.pool._Slot.free", lambda slot: True)
    own = Pool()
    first = own.empty((300, 1000), torch.float32)
    assert own.empty((300, 1000), torch.float32).data_ptr() == first.data_ptr()


def test_pool_fits_within_twice_and_gives_back() -> None:
    own = Pool()
    large = own.empty((1 << 20,), torch.uint8)
    pointer = large.data_ptr()
    del large
    small = own.empty((1 << 18,), torch.uint8)
    assert small.data_ptr() != pointer
    half = own.empty((1 << 19,), torch.uint8)
    assert half.data_ptr() == pointer
    own.clear()
    assert own.bytes == (1 << 20) + (1 << 18)  # both live
    del small, half
    own.clear()
    assert own.bytes == 0


def test_a_bound_pool_holds_one_region() -> None:
    own = Pool()
    held = own.empty((1 << 20,), torch.uint8)
    own.bound(3 << 20)
    assert own.bytes == 1 << 20  # what is in use stays
    del held
    own.clear()
    assert own.bytes == 0
    first, second, third = (own.empty((1 << 20,), torch.uint8) for _ in range(3))
    begin = first.data_ptr()
    assert [t.data_ptr() - begin for t in (second, third)] == [1 << 20, 2 << 20]
    del second
    small = own.empty((1 << 19,), torch.uint8)  # into the gap
    assert small.data_ptr() == begin + (1 << 20)
    view = third.view(2, -1)[1]
    del third
    other = own.empty((1 << 20,), torch.uint8)  # in no gap; the view keeps the last third
    assert not begin <= other.data_ptr() < begin + (3 << 20)
    del view
    assert own.empty((3 << 19,), torch.uint8).data_ptr() == begin + (3 << 19)
    assert own.bytes == 3 << 20
    own.shorten(2 << 20)
    assert own.bytes == 2 << 20
    assert not begin <= own.empty((3 << 18,), torch.uint8).data_ptr() < begin + (3 << 20)
    assert own.bytes == 3 << 19  # the gap at the end was given back
    own.shorten(9 << 20)
    assert own.empty((3 << 19,), torch.uint8).data_ptr() == begin + (3 << 19)
    own.bound(None)
    first.fill_(1)  # its memory is there as long as it is
    assert own.bytes == 0
    own.bound(0)
    assert own.empty((5 << 20,), torch.uint8).fill_(1).data_ptr() % 64 == 0
    assert own.bytes == 0


def test_pool_idle_time() -> None:
    idle = Pool(idle_seconds=0.0)
    idle.empty((1 << 20,), torch.uint8)
    for _ in range(300):
        idle.empty((1 << 18,), torch.uint8)
    assert idle.bytes < 1 << 20


def test_pool_threads() -> None:
    own, wrong = Pool(), []

    def work(tag: int) -> None:
        kept: list[Tensor] = []
        for i in range(400):
            t = own.empty((20_000 + 1000 * (i % 5),), torch.int32).fill_(tag)
            kept.append(t)
            if len(kept) > 3:
                old = kept.pop(0)
                if not bool((old == tag).all()):
                    wrong.append(tag)

    threads = [threading.Thread(target=work, args=(tag,)) for tag in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert own.bytes < 4 * 8 * 110_000


def test_ops_recycle_through_the_pool() -> None:
    base = weight(512, 512)
    pool.clear()
    OPS.materialize(base, *tail())
    held = pool.bytes
    for _ in range(20):
        OPS.materialize(base, *tail())
    assert pool.bytes == held
    kept = [OPS.materialize(base, *tail()) for _ in range(3)]
    assert len({t.data_ptr() for pair in kept for t in pair}) == 6


def on_gpu(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtypes", [*itertools.product(FLOATS, FLOATS)], ids=str)
def test_cuda_equals_cpu(dtypes: tuple[torch.dtype, torch.dtype], distribution: str) -> None:
    base, index = weight(1000, 1333, dtype=dtypes[0]), torch.tensor([[3, 999], [3, 0]])
    for r, decay in ((0, True), (1, False), (3, True)):
        given = tail(r, dtypes[1], distribution=distribution, decay=decay)
        found = OPS.materialize(base.cuda(), *on_gpu(given))
        assert same(tuple(t.cpu() for t in found), OPS.materialize(base, *given))
        for rows in (index, index.int()):
            found = OPS.materialize_rows(base.cuda(), rows.cuda(), *on_gpu(given))
            assert same(tuple(t.cpu() for t in found), OPS.materialize_rows(base, rows, *given))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_folds_on_cuda_equal_the_cpus(dtype: torch.dtype) -> None:
    for ends in (None, torch.tensor([True, False, True]), torch.tensor([False, True, False])):
        base = weight(1000, 333, dtype=dtype)
        there = base.cuda()
        for w in (there, base):
            fold_(w, *terms(3), int(KEY), ends=ends, first=2**32 - 5000)
        assert torch.equal(there.cpu(), base)
    probe = tail(2, torch.float32)
    found = OPS.materialize(there, *on_gpu(probe))
    assert same(tuple(t.cpu() for t in found), OPS.materialize(base, *probe))


@pytest.mark.gpu
@needs_cuda
def test_rows_out_of_range_are_nan_on_cuda() -> None:
    index = torch.tensor([0, 4, -1, 3]).cuda()
    plus, minus = OPS.materialize_rows(weight(4, 3).cuda(), index, *on_gpu(tail(1)))
    assert plus.isnan().all(1).tolist() == [False, True, True, False]
    assert minus.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.gpu
@needs_cuda
def test_indices_past_two_to_the_32_on_cuda() -> None:
    """Only two rows of the table are ever touched, and pages of no others are made."""
    width = 300_000
    index = torch.tensor([14316, 14317])  # 14316 * 3e5 < 2^32 < 14317 * 3e5
    base = torch.empty(14_318, width, dtype=torch.bfloat16, device="cuda")
    base[index] = 0
    given = (*terms(0), KEYS, SLOT, SEED, torch.tensor(1.0), torch.float32, "normal", True)
    plus, _ = OPS.materialize_rows(base, index.cuda(), *on_gpu(given))
    for k, row in enumerate(index.tolist()):
        z = noise_at(
            torch.arange(row * width, (row + 1) * width), stream_words(SEED, KEY), "normal"
        )
        assert torch.equal(plus[k].cpu(), z)
    whole, _ = OPS.materialize(base, *on_gpu(given))
    assert torch.equal(whole[-1], plus[-1])
