"""Stored formats: the definition, the kernel's bits, and what is promised of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from zograph import codec
from zograph.clipping import Clipped
from zograph.errors import ModelError, OptionError
from zograph.formats import BLOCK, FORMATS, Format, parse_transfer_dtype, with_format
from zograph.ir import ParamInfo
from zograph.kernels import codec as kernel
from zograph.noise import stream_words

PAIRS = [
    pytest.param(dtype, form, id=f"{form.name} of {str(dtype).removeprefix('torch.')}")
    for dtype, form in product((torch.float32, torch.bfloat16, torch.float16), FORMATS.values())
    if form.dtype.itemsize < dtype.itemsize
]
TERMS = (torch.tensor([3, 5, 9]), torch.tensor([0.1, 0.02, 0.3]), torch.tensor([0.9, 1.0, 0.99]))
ENDS = torch.tensor([True, False, True])


@pytest.fixture
def definition(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a function that calls another one without the kernel."""

    def call(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "serves", lambda weight: False)
            found: torch.Tensor = function(*args, **kwargs)
        return found

    return call


def values(dtype: torch.dtype, count: int = 9001) -> torch.Tensor:
    """Return numbers of all magnitudes, usual weights first."""
    generator = torch.Generator().manual_seed(0)
    power = torch.randint(-30, 20, (count,), generator=generator)
    x = torch.randn(count, generator=generator) * torch.exp2(power.float())
    x[:200] = torch.randn(200, generator=generator) * 0.02
    x[300:308] = torch.tensor([0.0, -0.0, 1e38, float("inf"), -3e38, 1e-40, 464.0, 65519.0])
    x[5 * BLOCK : 6 * BLOCK] = 1e-39
    x = x.to(dtype)
    return x.clamp(-65504, 65504) if dtype is torch.float16 else x


def stored(weight: torch.Tensor, form: Format) -> torch.Tensor:
    out = torch.zeros(form.nbytes(weight.numel()), dtype=torch.uint8)
    codec.encode(weight, form, out)
    return out


def read(raw: torch.Tensor, form: Format, like: torch.Tensor, **more: Any) -> torch.Tensor:
    out = torch.empty_like(like)
    codec.decode(raw, form, out, **more)
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize(("dtype", "form"), PAIRS)
def test_the_kernel_has_the_bits_of_the_definition(
    dtype: torch.dtype, form: Format, definition: Any
) -> None:
    if not kernel.serves(torch.zeros(1)):
        pytest.skip("no C++ compiler")
    weight = values(dtype)
    one, two = (torch.zeros(form.nbytes(weight.numel()), dtype=torch.uint8) for _ in range(2))
    counts = codec.encode(weight, form, one)
    assert torch.equal(counts, definition(codec.encode, weight, form, two))
    assert torch.equal(one, two)
    for rounding, distribution in product(("nearest", "stochastic"), ("normal", "rademacher")):
        a, b = torch.empty_like(weight), torch.empty_like(weight)
        more: dict[str, Any] = {"ends": ENDS, "rounding": rounding, "distribution": distribution}
        more |= {"first": 2**32 - 5000}  # across the end of the index's low word
        found = codec.decode(one, form, a, TERMS, -77, **more)
        assert torch.equal(found, definition(codec.decode, one, form, b, TERMS, -77, **more))
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize(("dtype", "form"), PAIRS)
def test_what_was_rounded_is_stored_exactly(dtype: torch.dtype, form: Format) -> None:
    weight = values(dtype)
    raw = stored(weight, form)
    once = read(raw, form, weight)
    assert torch.equal(read(stored(once, form), form, weight), once)
    assert bool(once.isfinite().all())
    for rounding in ("nearest", "stochastic"):
        more: dict[str, Any] = {"terms": TERMS, "key": 5, "ends": ENDS, "rounding": rounding}
        moved = read(raw, form, weight, **more)
        assert not torch.equal(moved, once)
        assert torch.equal(read(stored(moved, form), form, weight), moved)


@pytest.mark.parametrize(
    "form", [f for f in FORMATS.values() if not f.scaled], ids=lambda f: f.name
)
def test_floating_formats_round_as_torch_does(form: Format) -> None:
    weight = values(torch.float32)
    inside = weight.clamp(-form.largest, form.largest)
    assert torch.equal(read(stored(weight, form), form, weight), inside.to(form.dtype).float())


def test_int8_has_a_scale_for_each_block() -> None:
    form, weight = FORMATS["int8"], values(torch.float32)[:1000]
    raw = stored(weight, form)
    assert raw.numel() == 4 * 8 + 1000
    scales, whole = form.parts(raw, 1000)
    first = weight[:BLOCK].abs().max()
    assert float(scales[0]) == pytest.approx(float(first) / 127, rel=2**-16)
    assert int(whole[:BLOCK].abs().max()) == 127
    assert bool((scales * 127 == (scales.double() * 127)).all())  # exact in float32
    half = stored(weight.bfloat16(), form)
    assert bool((torch.frexp(form.parts(half, 1000)[0])[0].abs() <= 0.5).all())


@pytest.mark.parametrize("name", FORMATS)
def test_the_documented_error_of_a_weight(name: str) -> None:
    form = FORMATS[name]
    weight = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1)) * 0.02
    error = (read(stored(weight, form), form, weight) - weight).abs()
    if form.scaled:
        limit = codec.blocks(weight).abs().amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1) / 254
        limit = limit * (1 + 2**-8)  # the cut of the scale
    else:
        limit = weight.abs().clamp(min=2.0**form.lowest) * 2.0 ** -(form.mantissa + 1)
    assert bool((error <= limit).all())
    assert float((error / limit).max()) > 0.9  # no more is promised than is true


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    form, count = FORMATS[name], 1 << 16
    weight = torch.full((count,), 0.01)
    weight[::BLOCK] = 1.0
    raw = stored(weight, form)
    start = read(raw, form, weight)
    step = torch.full((count,), 1.234e-5 if name == "float16" else 1.234e-4)
    step[::BLOCK] = 0.0
    rademacher = {"terms": (torch.tensor([11]), torch.tensor([float(step[1])]), None), "key": 7}
    more: dict[str, Any] = {"ends": torch.tensor([True]), "distribution": "rademacher"}
    exact = read(raw, form, weight, **rademacher, distribution="rademacher")
    up = (exact > start) & (torch.arange(count) % BLOCK > 0)
    found = read(raw, form, weight, **rademacher, **more, rounding="stochastic")
    lost = found[up].double() - exact[up].double()
    near = read(raw, form, weight, **rademacher, **more)[up].double() - exact[up].double()
    deviation = float(lost.std()) / float(up.sum()) ** 0.5
    assert float(lost.mean().abs()) < 4.5 * deviation
    assert float(near.mean().abs()) > 20 * deviation  # nearest is biased here


def test_the_bits_of_the_rounding_are_no_function_of_the_noise() -> None:
    """A stream of its own: uniform, and uncorrelated with z of the same seed and key."""
    seed, key = torch.tensor(123), torch.tensor(456)
    index = torch.arange(1 << 18)
    random = codec.unit(codec.rounding_bits(index, stream_words(seed ^ codec.SALT, key)))
    z = torch.empty(1 << 18)
    codec.decode(
        torch.zeros(1 << 19, dtype=torch.uint8), FORMATS["bfloat16"], z,
        (seed.view(1), torch.ones(1), None), 456,
    )  # fmt: skip
    pair = torch.stack([random.double(), z.double()])
    assert float(torch.corrcoef(pair)[0, 1].abs()) < 5 / 2**9
    assert float(torch.corrcoef(torch.stack([random.double(), z.double() ** 2]))[0, 1]) < 5 / 2**9
    assert float(random.mean()) == pytest.approx(0.5, abs=5 * 12**-0.5 / 2**9)
    assert 0 <= float(random.min()) < 1e-4 < 0.9999 < float(random.max()) < 1


def test_outliers_are_clipped_and_told_once() -> None:
    weight = torch.tensor([1e6, -1e6, float("inf"), 1.0])
    clipped = Clipped()
    for name, form in (("a", FORMATS["float16"]), ("b", FORMATS["float8_e4m3fn"])):
        raw = torch.zeros(form.nbytes(4), dtype=torch.uint8)
        clipped.add(name, codec.encode(weight, form, raw))
        expected = [form.largest, -form.largest, form.largest, 1.0]
        assert read(raw, form, weight).tolist() == expected
    clipped.add("b", torch.tensor([4, 0]))
    with pytest.warns(UserWarning, match=r"10 elements of 2 weights .* the most, 7, in 'b'"):
        clipped.check()
    clipped.check()  # warnings are errors here


def test_nan_is_refused() -> None:
    weight = torch.tensor([1.0, float("nan")])
    for form in FORMATS.values():
        counts = codec.encode(weight, form, torch.zeros(form.nbytes(2), dtype=torch.uint8))
        with pytest.raises(ModelError, match="'w' has 1 elements that are NaN"):
            Clipped().add("w", counts)


def test_which_weights_have_a_format() -> None:
    shapes = {"w": (4, 4), "b": (4,), "s": (), "h": (4, 4), "i": (4, 4), "d": (2, 2, 2)}
    dtypes = {"h": torch.bfloat16, "i": torch.int64, "d": torch.float64}
    table = {
        n: ParamInfo(n, s, dtypes.get(n, torch.float32), n != "i", True, 1)
        for n, s in shapes.items()
    }
    for name, expected in {"bfloat16": "wd", "int8": "whd", "float8_e5m2": "whd"}.items():
        found = with_format(table, FORMATS[name].dtype)
        assert "".join(n for n, p in found.items() if p.format is not None) == expected
    assert with_format(table, None) == table
    assert with_format(table, torch.int8)["w"].stored_bytes == 4 + 16


def test_unknown_formats_list_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert parse_transfer_dtype("bfloat16", cpu) is torch.bfloat16
    assert parse_transfer_dtype(torch.int8, cpu) is torch.int8
    for wrong in ("int4", torch.float32, torch.complex64):
        with pytest.raises(
            OptionError, match="bfloat16, float16, float8_e4m3fn, float8_e5m2, int8"
        ):
            parse_transfer_dtype(wrong, cpu)
    monkeypatch.setattr("zograph.formats.converts", lambda dtype, _: dtype.itemsize > 1)
    with pytest.raises(OptionError, match="not supported on cpu; use one of bfloat16, float16, or"):
        parse_transfer_dtype("float8_e5m2", cpu)


def test_double_weights_are_computed_in_float32() -> None:
    form, weight = FORMATS["int8"], values(torch.float32)[:300]
    raw = stored(weight.double(), form)
    assert torch.equal(raw, stored(weight, form))
    one = read(raw, form, weight, terms=TERMS, key=5, ends=ENDS)
    assert torch.equal(
        read(raw, form, weight.double(), terms=TERMS, key=5, ends=ENDS), one.double()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "form"), PAIRS)
def test_cuda_has_the_bits_of_the_cpu(dtype: torch.dtype, form: Format) -> None:
    weight = values(dtype, (1 << 22) + 9001)  # more than one tile
    raw = stored(weight, form)
    there = torch.zeros_like(raw, device="cuda")
    codec.encode(weight.cuda(), form, there)
    assert torch.equal(there.cpu(), raw)
    terms = tuple(t.cuda() for t in TERMS)
    for rounding, distribution in product(("nearest", "stochastic"), ("normal", "rademacher")):
        more: dict[str, Any] = {"ends": ENDS, "rounding": rounding, "distribution": distribution}
        more |= {"first": 2**32 - 5000}
        a, b = torch.empty_like(weight), torch.empty_like(weight, device="cuda")
        codec.decode(raw, form, a, TERMS, -77, **more)
        codec.decode(there, form, b, terms, -77, **more)  # type: ignore[arg-type]
        assert torch.equal(bits(a), bits(b.cpu()))
