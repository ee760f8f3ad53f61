"""The noise: its bits, in every engine, and its statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from zograph import kernels
from zograph.noise import (
    DISTRIBUTIONS,
    check_distribution,
    derive_seed,
    noise,
    noise_at,
    parameter_key,
    stream_words,
)

N = 10_000_000
Generator = Callable[[int, int, int, int], np.ndarray]  # (seed, key, first, count) -> float32

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler")


def defined(seed: int, key: int, first: int, count: int, distribution: str = "normal") -> Tensor:
    words = stream_words(torch.tensor(seed), torch.tensor(key))
    return noise_at(torch.arange(first, first + count), words, distribution)


def ours(seed: int, key: int, first: int, count: int) -> np.ndarray:
    if not kernels.available():
        return defined(seed, key, first, count).numpy()
    out = torch.empty(count)
    kernels.fill(out, seed, key, "normal", first=first)
    return out.numpy()


# ---- bits ------------------------------------------------------------------------------------


def test_golden_values() -> None:
    """A change of any bit is a new NOISE_VERSION."""
    z = noise("a.weight", (8,), 1)
    assert z.view(torch.int32).tolist() == GOLDEN
    signs = noise("a.weight", (8,), 1, distribution="rademacher")
    assert signs.tolist() == GOLDEN_SIGNS
    assert parameter_key("a.weight") == GOLDEN_KEY
    assert derive_seed(0, 0, 0) == GOLDEN_SEED


GOLDEN = [
    1068480560,
    1073623334,
    -1087484673,
    1046258622,
    -1089588569,
    1065503233,
    1070159228,
    -1081397799,
]
GOLDEN_SIGNS = [-1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 1.0]
GOLDEN_KEY = 4531091654234510101
GOLDEN_SEED = 1235401608597399757


def test_stream_words_follow_the_stated_integers() -> None:
    mask = (1 << 64) - 1

    def mix(h: int) -> int:
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        return h ^ (h >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, key in [(0, 0), (-1, 5), (2**63 - 1, -(2**63)), (12345, -98765432109876)]:
        a = mix((mix((seed + golden) & mask) + key) & mask)
        b = mix((mix((key & mask) ^ golden) + a) & mask)
        words = [int(w) & 0xFFFFFFFF for w in stream_words(torch.tensor(seed), torch.tensor(key))]
        assert words == [a & 0xFFFFFFFF, a >> 32, b & 0xFFFFFFFF, b >> 32]


@needs_kernels
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("first", "count"), [(0, N), (2**32 - 500_001, 1_000_003), (2**40 + 3, 1_000_003)]
)
def test_kernel_equals_definition(distribution: str, first: int, count: int) -> None:
    out = torch.empty(count)
    kernels.fill(out, 7, -9, distribution, first=first)
    for a in range(0, count, 1 << 20):
        z = defined(7, -9, first + a, min(1 << 20, count - a), distribution)
        assert torch.equal(out[a : a + (1 << 20)], z)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_compiled_definition_equals_eager(distribution: str) -> None:
    def make(start: Tensor, seed: Tensor, key: Tensor) -> Tensor:
        index = torch.arange(1 << 21) + start
        return noise_at(index, stream_words(seed, key), distribution)

    compiled = torch.compile(make, fullgraph=True)
    for start in (0, 1 << 21, 2 << 21, 3 << 21, 4 << 21, 2**32 - 1000):
        at = torch.tensor(start)
        z = defined(3, 11, start, 1 << 21, distribution)
        assert torch.equal(compiled(at, torch.tensor(3), torch.tensor(11)), z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_the_definition_rounded(dtype: torch.dtype) -> None:
    z = noise("w", (3, 5, 7), 42, dtype=dtype)
    expected = defined(42, parameter_key("w"), 0, 105).view(3, 5, 7).to(dtype)
    assert z.dtype == dtype
    assert torch.equal(z, expected)


def test_the_high_index_word_matters() -> None:
    low, high = defined(1, 2, 0, 100_000), defined(1, 2, 2**32, 100_000)
    assert not torch.equal(low.sort().values, high.sort().values)
    assert abs(np.corrcoef(low, high)[0, 1]) < 5 / math.sqrt(100_000)


def test_shapes() -> None:
    assert noise("w", (), 1).shape == ()
    assert noise("w", 5, 1).shape == (5,)
    assert noise("w", (0, 3), 1).shape == (0, 3)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"'cauchy'; valid distributions: 'normal', 'rademacher'"):
        noise("w", 3, 1, distribution="cauchy")
    with pytest.raises(ValueError, match="floating dtype"):
        noise("w", 3, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="64-bit"):
        noise("w", 3, 1 << 63)
    check_distribution("normal")


def test_derived_seeds_are_distinct() -> None:
    seeds = {derive_seed(r, s, d) for r in range(20) for s in range(200) for d in range(5)}
    assert len(seeds) == 20_000
    assert all(0 <= s < 1 << 63 for s in seeds)


# ---- statistics ------------------------------------------------------------------------------


def moment_scores(z: np.ndarray) -> list[float]:
    """Deviations of the first six moments from N(0, 1)'s, in standard errors."""
    expected = [0.0, 1.0, 0.0, 3.0, 0.0, 15.0]
    variance = [1.0, 2.0, 15.0, 96.0, 945.0, 10170.0]
    x, power, scores = z.astype(np.float64), np.ones(len(z)), []
    for mean, var in zip(expected, variance, strict=True):
        power *= x
        scores.append(float((power.mean() - mean) / math.sqrt(var / len(z))))
    return scores


def ks_distance(z: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance to N(0, 1), in units of its 1 % critical value."""
    p = scipy.stats.norm.cdf(np.sort(z))
    steps = np.arange(len(z) + 1) / len(z)
    distance = max((steps[1:] - p).max(), (p - steps[:-1]).max())
    return float(distance / (1.6276 / math.sqrt(len(z))))


def tail_score(z: np.ndarray, at: float) -> float:
    """Deviation of the count beyond +/- `at`, in Poisson standard deviations."""
    expected = 2 * scipy.stats.norm.sf(at) * len(z)
    return float((np.count_nonzero(np.abs(z) > at) - expected) / math.sqrt(expected))


def correlation_score(a: np.ndarray, b: np.ndarray) -> float:
    """The larger of corr(a, b) and corr(a^2, b^2), in units of 1/sqrt(n)."""
    scores = []
    for x, y in ((a, b), (a * a, b * b)):
        u, v = x - x.mean(dtype=np.float64), y - y.mean(dtype=np.float64)
        scores.append(abs(float(np.dot(u, v) / np.sqrt(np.dot(u, u) * np.dot(v, v)))))
    return max(scores) * math.sqrt(len(a))


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return ours(2024, parameter_key("model.layers.0.weight"), 0, N)


def test_moments(sample: np.ndarray) -> None:
    assert max(map(abs, moment_scores(sample))) < 5


def test_kolmogorov_smirnov(sample: np.ndarray) -> None:
    assert ks_distance(sample) < 1


@pytest.mark.parametrize(("at", "bound"), [(4.0, 5.0), (4.5, 5.0)])
def test_tails(sample: np.ndarray, at: float, bound: float) -> None:
    assert abs(tail_score(sample, at)) < bound


def test_first_values_over_many_streams() -> None:
    """One value of each of many streams is as normal as many values of one."""
    seeds = torch.arange(1_000_000)
    for key in (0, parameter_key("w")):
        words = stream_words(seeds, torch.tensor(key))
        z = noise_at(torch.zeros(1, dtype=torch.int64), words, "normal").numpy()
        assert max(map(abs, moment_scores(z))) < 5
        assert ks_distance(z) < 1
        assert correlation_score(z[1:], z[:-1]) < 5


@pytest.mark.parametrize("lag", [1, 2, 3, 5, 7, *(1 << k for k in range(2, 23))])
def test_lags(sample: np.ndarray, lag: int) -> None:
    n = 1_000_000
    assert correlation_score(sample[lag : lag + n], sample[:n]) < 5


def far_lag_score(make: Callable[[int, int], np.ndarray]) -> float:
    """The worst correlation of 2^18 elements with those any power of two further on."""
    near = make(0, 1 << 18)
    return max(correlation_score(near, make(1 << k, 1 << 18)) for k in range(18, 63))


def test_far_lags() -> None:
    key = parameter_key("w")
    assert far_lag_score(lambda first, count: ours(1, key, first, count)) < 5
    signs = [defined(1, key, at, 1 << 18, "rademacher") for at in (0, 1 << 31, 1 << 34)]
    for a, b in itertools.combinations(signs, 2):
        assert abs(float(torch.dot(a, b))) < 5 * 2**9


def plain(seed: int, key: int, first: int, count: int, *, weak: bool = False) -> np.ndarray:
    """The definition once more, in numpy's unsigned integers; `weak` leaves one product out."""
    words = [int(w) & 0xFFFFFFFF for w in stream_words(torch.tensor(seed), torch.tensor(key))]
    k0, k1, k2, k3 = (np.uint32(w) for w in words)
    index = np.arange(first, first + count, dtype=np.uint64)
    lo, high = index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)

    def mix(x: np.ndarray, product: int, shift: int) -> np.ndarray:
        x = x * np.uint32(product)
        return x ^ (x >> np.uint32(shift))

    hi = mix(high, 0x9E3779B1, 16)
    x = mix(mix(lo ^ k0, 0x9E3779B1, 16) + (k1 ^ hi), 0x85EBCA6B, 15)
    if not weak:
        x = mix(x, 0xC2B2AE35, 16)
    y = mix(mix(x + k2, 0x7FEB352D, 15) ^ (k3 + hi), 0x846CA68B, 16)
    v = mix(mix(y + k1, 0x31848BAB, 14) ^ x, 0x2C1B3C6D, 17)
    half = np.uint32(0xFFFF)
    total = sum(((h & half) + (h >> np.uint32(16))).astype(np.int32) for h in (x, y, v))
    t = (np.asarray(total) - 196605).astype(np.float32) * np.float32(2.15791860e-05)
    q = t * t
    poly = q * np.float32(3.57058025e-06)
    for c in (-3.05405629e-05, 3.96967982e-04, 7.32545182e-03):
        poly = (poly + np.float32(c)) * q
    return np.asarray((poly + np.float32(0.974835217)) * t)


def test_plain_reading_of_the_definition() -> None:
    for first in (0, 2**32 - 500, 2**50 + 7):
        expected = defined(-3, 99, first, 1000).numpy()
        assert np.array_equal(plain(-3, 99, first, 1000), expected)
        assert not np.array_equal(plain(-3, 99, first, 1000, weak=True), expected)


def test_a_weaker_hash_fails_only_at_far_lags() -> None:
    """Why every product stays: near by, the hash with one product fewer looks as good."""
    near = plain(1, parameter_key("w"), 0, (1 << 20) + 4096, weak=True)
    n = 1 << 20
    assert max(correlation_score(near[:n], near[k : k + n]) for k in (1, 2, 16, 4096)) < 5
    far = far_lag_score(lambda a, n: plain(1, parameter_key("w"), a, n, weak=True))
    assert far > 20


SEEDS = [1, 2, 2024 ^ 1, 2024 + 1, 2024 + (1 << 32), 2024 | (1 << 62), -2024]


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_are_uncorrelated(sample: np.ndarray, seed: int) -> None:
    other = ours(seed, parameter_key("model.layers.0.weight"), 0, 2_000_000)
    assert correlation_score(sample[:2_000_000], other) < 5
    assert correlation_score(sample[1:2_000_000], other[:-1]) < 5


@pytest.mark.parametrize("change", [1, 1 << 31, 1 << 32, 1 << 62])
def test_keys_are_uncorrelated(sample: np.ndarray, change: int) -> None:
    other = ours(2024, parameter_key("model.layers.0.weight") ^ change, 0, 2_000_000)
    assert correlation_score(sample[:2_000_000], other) < 5


def best_shift(a: np.ndarray, b: np.ndarray) -> float:
    """The largest cyclic cross-correlation of two series over all shifts, in units of 1/sqrt(n)."""
    product = np.fft.irfft(np.fft.rfft(a) * np.conj(np.fft.rfft(b)), len(a))
    return float(np.abs(product).max() / math.sqrt(len(a)))


def test_no_stream_is_a_shift_of_another() -> None:
    """Over 2^20 shifts and both orders the largest score of independent series is about 5.1."""
    n = 1 << 20
    streams = [ours(derive_seed(0, s, 0), 5, 0, n) for s in range(4)]
    for a, b in itertools.pairwise(streams):
        assert best_shift(a, b) < 6.5
        assert best_shift(a, b[::-1].copy()) < 6.5
        assert np.intersect1d(a.view(np.int32)[:1000], b.view(np.int32)[:1000]).size < 20
    assert best_shift(streams[0], np.roll(streams[0], 777)) > 100


def bad_generator(seed: int, key: int, first: int, count: int) -> np.ndarray:
    """Two added 16-bit uniforms of a multiplicative hash: what the statistics must reject."""
    index = np.arange(first, first + count, dtype=np.uint64) + np.uint64(seed + key)
    x = (index * np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)
    s = (x & np.uint64(0xFFFF)).astype(np.float32) + (x >> np.uint64(16)).astype(np.float32)
    return (s - 65535) / np.float32(65536 / math.sqrt(6))


def test_negative_control() -> None:
    z = bad_generator(1, 2, 0, 2_000_000)
    assert max(map(abs, moment_scores(z))) > 50
    assert ks_distance(z) > 10
    assert abs(tail_score(z, 4.0)) > 5
    assert correlation_score(z[8:], z[:-8]) > 50
    assert correlation_score(z[1:], bad_generator(2, 2, 0, 2_000_000)[:-1]) > 100
    assert best_shift(z, bad_generator(9, 2, 0, 2_000_000)) > 100


def test_rademacher_is_fair() -> None:
    z = noise("w", N, 9, distribution="rademacher").numpy()
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(float(z.mean(dtype=np.float64))) < 5 / math.sqrt(N)
    for lag in (1, 2, 16, 4096, 65536):
        assert abs(float(np.mean(z[lag:] * z[:-lag], dtype=np.float64))) < 5 / math.sqrt(N - lag)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_cuda_equals_cpu(distribution: str) -> None:
    z = noise("w", N, 3, distribution=distribution, device="cuda")
    assert torch.equal(z.cpu(), noise("w", N, 3, distribution=distribution))
