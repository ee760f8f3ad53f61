"""Run the Triton kernels in Triton's interpreter, on the CPU, beside the definitions.

``python -m tests.zograph.interpreted`` prints as JSON how many cases there were and the names of
those that differ. A process of its own, since Triton reads the switch when it is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from tests.zograph.test_codec import ENDS, PAIRS, TERMS, values
from zograph import codec
from zograph.formats import FORMATS, Format
from zograph.kernels import Terms, tiles, triton_codec, triton_mixing, triton_noise
from zograph.kernels import codec as native

DISTRIBUTIONS = ("normal", "rademacher")
FAR = 2**32 - 5000
"""An index from which the low word overflows soon."""


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def formats() -> Iterator[tuple[str, bool]]:
    """Encode and decode in every way."""
    native.serves = lambda weight: False  # the definition
    pairs = [(*pair.values, str(pair.id)) for pair in PAIRS]
    for dtype, form, name in [*pairs, (torch.float64, FORMATS["int8"], "int8 of float64")]:
        assert isinstance(form, Format)
        weight = values(torch.float32 if dtype is torch.float64 else dtype).to(dtype)
        weight[-41:] = 0  # of the last block, which is short: less than the noise behind it
        raw, found = (torch.zeros(form.nbytes(len(weight)), dtype=torch.uint8) for _ in range(2))
        counts = codec.encode(weight, form, raw)
        seen = triton_codec.encode(weight, form, found)
        yield f"encode {name}", torch.equal(raw, found) and torch.equal(counts, seen)
        for rounding, distribution in product(("nearest", "stochastic"), DISTRIBUTIONS):
            for terms, ends in ((TERMS, ENDS), (codec.NOTHING, ENDS[:0])):
                a, b = torch.empty_like(weight), torch.empty_like(weight)
                more = {"distribution": distribution, "first": FAR}
                seen = codec.decode(raw, form, a, terms, -77, ends=ends, rounding=rounding, **more)
                counts = triton_codec.decode(
                    raw, form, b, terms, -77, ends,
                    salt=codec.SALT, stochastic=rounding == "stochastic", **more,
                )  # fmt: skip
                case = f"decode {name}, {rounding}, {distribution}, {len(terms[0])} terms"
                yield case, same(a, b) and torch.equal(counts, seen)


def noise() -> Iterator[tuple[str, bool]]:
    """Fold and perturb in every way but into bfloat16, where the interpreter cuts off."""
    generator = torch.Generator().manual_seed(0)
    keys, probe, eps = torch.tensor([[0, 0], [-77, FAR]]), torch.tensor(13), torch.tensor(0.01)
    rows = torch.tensor([3, 0, 3, 8])
    dtypes = (torch.float32, torch.float16, torch.float64)
    for dtype, distribution, decays in product(dtypes, DISTRIBUTIONS, (True, False)):
        terms: Terms = (TERMS[0], TERMS[1], TERMS[2] if decays else None)
        weight = torch.randn(9, 701, generator=generator, dtype=torch.float64).to(dtype)
        name = f"{dtype}, {distribution}, decay {decays}"
        both = [weight.clone() for _ in range(2)]
        for engine, base in zip((tiles, triton_noise), both, strict=True):
            engine.fold(base, terms, -77, distribution, ENDS, FAR)
        yield f"fold {name}", same(*both)
        for index, out in product((None, rows), (torch.float32, torch.float16)):
            shape = weight.shape if index is None else (4, 701)
            found = [[torch.empty(shape, dtype=out) for _ in range(2)] for _ in range(2)]
            for engine, outs in zip((tiles, triton_noise), found, strict=True):
                given = (*outs, terms, keys, 1, probe, eps, distribution)
                engine.perturb(weight, index, *given)
            yield f"perturb {name}, {out}, {index}", all(map(same, *found))


def mixing() -> Iterator[tuple[str, bool]]:
    """Observe and mix rows shorter and longer than a program's part, against float64."""
    generator = torch.Generator().manual_seed(0)
    for dtype, width in product((torch.float32, torch.float16), (5, 4096, 9001)):
        value, z = (torch.randn(3, width, generator=generator).to(dtype) for _ in range(2))
        values, residuals = (torch.randn(3, 4, width, generator=generator) for _ in range(2))
        slot, active = torch.tensor([0, 3, 2]), torch.tensor([True, False, True])
        expected = [values.clone(), residuals.clone()]
        step = value.double() - z.double()
        for b in (0, 2):
            expected[0][b, slot[b]] = value[b].float()
            expected[1][b, slot[b]] = step[b].float()
        sums = torch.einsum("bd,bsd->bs", step, expected[1].double())
        own = torch.stack([step.square().sum(1), value.double().square().sum(1)], dim=1)
        found = triton_mixing.observe(value, z, values, residuals, slot, active)
        wanted = torch.cat([sums, own], dim=1) * active[:, None]
        name = f"{dtype}, {width}"
        stored = torch.equal(values, expected[0]) and torch.equal(residuals, expected[1])
        yield f"observe {name}", stored and torch.allclose(found, wanted, atol=1e-3)
        yield f"norms {name}", torch.allclose(triton_mixing.norms(value, z), own, rtol=1e-5)
        weights = torch.randn(3, 4, generator=generator).double()
        weights[:, 1] = 0
        values[:, 1] = float("nan")
        for damping in (0.0, -0.25):
            out = torch.empty(3, width, dtype=dtype)
            triton_mixing.mix(weights, damping, values, residuals, out)
            terms = (values + damping * residuals).double()[:, [0, 2, 3]]
            total = torch.einsum("bs,bsd->bd", weights[:, [0, 2, 3]], terms)
            close = 1e-5 if dtype is torch.float32 else 2e-3
            yield f"mix {name}, {damping}", torch.allclose(out.double(), total, close, close)


def main() -> None:
    cases = [*formats(), *noise(), *mixing()]
    print(json.dumps({"cases": len(cases), "differ": [name for name, ok in cases if not ok]}))


if __name__ == "__main__":
    main()
