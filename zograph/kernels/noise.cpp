// The CPU kernels: zograph/noise.py's definition, bit for bit, over cache tiles.
//
// Floating point: -ffp-contract=off and no fast-math, every + - * rounded on its own to float32.
// A tile is at most TILE elements and never crosses a 2^32 boundary of the element index, so the
// high index word is a constant of the tile.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 4096;
constexpr int64_t SERIAL = 32768;  // below this many elements a parallel region costs more
#if defined(__clang__)
#define NO_ALIAS _Pragma("clang loop vectorize(assume_safety)")
#else
#define NO_ALIAS _Pragma("GCC ivdep")
#endif
#define INLINE inline __attribute__((always_inline))
constexpr int64_t BLOCK = 128;   // elements between two rounds of fetching ahead
constexpr int64_t AHEAD = 2048;  // bytes fetched ahead
enum DType { F32 = 0, BF16 = 1, F16 = 2 };

struct Words { uint32_t k0, k1, k2, k3; };

// Elements from `at` to the next 2^32 boundary of the index.
inline int64_t room(int64_t at) { return (1ll << 32) - (at & 0xffffffffll); }

uint64_t mix(uint64_t h) {
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
  return h ^ (h >> 31);
}

Words stream_words(int64_t seed, int64_t key) {
  const uint64_t golden = 0x9E3779B97F4A7C15ull, k = (uint64_t)key;
  const uint64_t a = mix(mix((uint64_t)seed + golden) + k), b = mix(mix(k ^ golden) + a);
  return {(uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b, (uint32_t)(b >> 32)};
}

inline uint32_t bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline float real(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }

// One tile's view of a stream: the words with the high index word already mixed in.
struct Stream {
  uint32_t lo, k0, k1h, k2, k3h, k1;
  Stream(Words k, int64_t start) {
    uint32_t hi = (uint32_t)(start >> 32) * 0x9E3779B1u; hi ^= hi >> 16;
    lo = (uint32_t)start; k0 = k.k0; k1 = k.k1; k2 = k.k2;
    k1h = k.k1 ^ hi; k3h = k.k3 + hi;
  }
  template <bool NORMAL> inline float at(uint32_t i) const {
    uint32_t x = ((lo + i) ^ k0) * 0x9E3779B1u; x ^= x >> 16;
    x = (x + k1h) * 0x85EBCA6Bu; x ^= x >> 15;
    x *= 0xC2B2AE35u; x ^= x >> 16;
    uint32_t y = (x + k2) * 0x7FEB352Du; y ^= y >> 15;
    y = (y ^ k3h) * 0x846CA68Bu; y ^= y >> 16;
    if (!NORMAL) return real(0x3F800000u | (y & 0x80000000u));
    uint32_t v = (y + k1) * 0x31848BABu; v ^= v >> 14;
    v = (v ^ x) * 0x2C1B3C6Du; v ^= v >> 17;
    const uint32_t s = (x & 0xffff) + (x >> 16) + (y & 0xffff) + (y >> 16) + (v & 0xffff) + (v >> 16);
    const float t = (float)((int32_t)s - 196605) * 2.15791860e-05f, q = t * t;
    float p = q * 3.57058025e-06f;
    p = (p + -3.05405629e-05f) * q;
    p = (p + 3.96967982e-04f) * q;
    p = (p + 7.32545182e-03f) * q;
    return (p + 0.974835217f) * t;
  }
};

// ---- 16-bit formats: round to nearest even, NaN stays NaN -----------------------------------
inline uint16_t to_bf16(float f) {
  const uint32_t u = bits(f);
  const uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : r);
}
inline uint16_t to_f16(float f) {
  const uint32_t u = bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t small = bits(real(a < 0x38800000u ? a : 0u) + 0.5f) - 0x3f000000u;
  const uint32_t big = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (uint16_t)(sign | (a >= 0x47800000u ? big : a < 0x38800000u ? small : normal));
}
inline float from_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, m = (uint32_t)(h & 0x7fffu) << 13;
  const uint32_t e = m & 0x0f800000u;
  const float small = real(m + 0x38800000u) - real(0x38800000u);
  const uint32_t other = m + (e == 0x0f800000u ? 0x70000000u : 0x38000000u);
  return real(sign | (e == 0 ? bits(small) : other));
}
inline float from_bf16(uint16_t h) { return real((uint32_t)h << 16); }

const float* load(const void* p, int type, int64_t at, int n, float* tile) {
  const uint16_t* h = (const uint16_t*)p + at;
  if (type == F32) return (const float*)p + at;
  if (type == BF16) for (int i = 0; i < n; i++) tile[i] = from_bf16(h[i]);
  else for (int i = 0; i < n; i++) tile[i] = from_f16(h[i]);
  return tile;
}
void store(const float* tile, int n, void* p, int type, int64_t at) {
  uint16_t* h = (uint16_t*)p + at;
  if (type == F32) { if (tile != (float*)p + at) std::memcpy((float*)p + at, tile, 4 * n); }
  else if (type == BF16) for (int i = 0; i < n; i++) h[i] = to_bf16(tile[i]);
  else for (int i = 0; i < n; i++) h[i] = to_f16(tile[i]);
}

// ---- the pending terms: w <- fl(fl(scale w) + fl(c z)), in order -----------------------------
struct Terms {
  std::vector<Words> words;
  const float *coefs, *scales;  // scales null: no decay
  Terms(const int64_t* seeds, const float* c, const float* s, int64_t r, int64_t key)
      : coefs(c), scales(s) {
    words.reserve(r);
    for (int64_t j = 0; j < r; j++) words.push_back(stream_words(seeds[j], key));
  }
};

// body(i) for i in [0, n); meanwhile the lines AHEAD bytes further on are fetched of x, to be read,
// and of y and z, to be written (null: none).  The hardware's own prefetching stops at every page,
// and there memory would wait for arithmetic.  Fetching past an array's end does nothing.
template <class F>
INLINE void sweep(int n, const float* x, const float* y, const float* z, F body) {
  auto line = [](const float* p, int at) { return (const char*)((uintptr_t)(p + at) + AHEAD); };
  int i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    for (int u = i; u < i + BLOCK; u += 16) {
      __builtin_prefetch(line(x, u), 0);
      if (y) __builtin_prefetch(line(y, u), 1);
      if (z) __builtin_prefetch(line(z, u), 1);
    }
    NO_ALIAS
    for (int u = i; u < i + BLOCK; u++) body(u);
  }
  NO_ALIAS
  for (; i < n; i++) body(i);
}

template <bool N> void term(const float* w, float* out, int n, const Stream& s, float c) {
  sweep(n, w, out, nullptr, [&](int i) {
    const float d = c * s.at<N>(i);
    out[i] = w[i] + d;
  });
}
template <bool N> void term(const float* w, float* out, int n, const Stream& s, float c, float f) {
  sweep(n, w, out, nullptr, [&](int i) {
    const float d = c * s.at<N>(i), a = f * w[i];
    out[i] = a + d;
  });
}

void round_through(float* x, int n, int type) {
  if (type == BF16) for (int i = 0; i < n; i++) x[i] = from_bf16(to_bf16(x[i]));
  if (type == F16) for (int i = 0; i < n; i++) x[i] = from_f16(to_f16(x[i]));
}

// The tile's weights after the terms, rounded through the base dtype behind the last one and
// behind those marked in `ends` (null: none); `out` may be `w`.
template <bool N>
const float* apply(const float* w, float* out, int n, int64_t start, const Terms& t, int type,
                   const uint8_t* ends = nullptr) {
  for (size_t j = 0; j < t.words.size(); j++) {
    const Stream s(t.words[j], start);
    if (t.scales) term<N>(w, out, n, s, t.coefs[j], t.scales[j]);
    else term<N>(w, out, n, s, t.coefs[j]);
    w = out;
    if (j + 1 == t.words.size() || (ends && ends[j])) round_through(out, n, type);
  }
  return w;
}

template <bool N>
void both(const float* w, float* p, float* m, int n, const Stream& s, float eps) {
  sweep(n, w, p, m, [&](int i) {
    const float d = eps * s.at<N>(i), a = w[i];
    p[i] = a + d; m[i] = a - d;
  });
}
template <bool N> void minus(const float* w, float* m, int n, const Stream& s, float eps) {
  sweep(n, w, m, nullptr, [&](int i) {
    const float d = eps * s.at<N>(i);
    m[i] = w[i] - d;
  });
}

struct Job {
  const void* base; void *plus, *minus; int base_t, out_t;
  Terms terms; Words words; float eps;
};

// n elements whose noise index starts at `start`, read from base + from, written at `to`.
template <bool N> void span(const Job& j, int64_t start, int64_t from, int64_t to, int64_t n) {
  alignas(64) float w[TILE], p[TILE], m[TILE];
  while (n > 0) {
    const int k = (int)std::min({n, TILE, room(start)});
    const float* x = apply<N>(load(j.base, j.base_t, from, k, w), w, k, start, j.terms, j.base_t);
    const Stream s(j.words, start);
    float* po = j.out_t == F32 ? (float*)j.plus + to : p;
    float* mo = j.out_t == F32 ? (float*)j.minus + to : m;
    if (j.plus && j.minus) both<N>(x, po, mo, k, s, j.eps);
    else if (j.plus) term<N>(x, po, k, s, j.eps);
    else minus<N>(x, mo, k, s, j.eps);
    if (j.plus) store(po, k, j.plus, j.out_t, to);
    if (j.minus) store(mo, k, j.minus, j.out_t, to);
    start += k; from += k; to += k; n -= k;
  }
}

// f(begin, end) over [0, n), in blocks of `grain` elements, on up to `threads` threads.
template <class F> void parallel(int64_t n, int64_t grain, int threads, bool serial, F f) {
  const int64_t blocks = (n + grain - 1) / grain;
  if (serial || threads < 2 || blocks < 2) { if (n > 0) f((int64_t)0, n); return; }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
  for (int64_t b = 0; b < blocks; b++) f(b * grain, std::min(n, (b + 1) * grain));
}

template <bool N>
void fold(void* base, int type, int64_t n, int64_t first, const Terms& t, const uint8_t* ends,
          int threads) {
  parallel(n, TILE, threads, n < SERIAL, [&](int64_t a, int64_t e) {
    alignas(64) float w[TILE];
    for (int64_t i = a; i < e;) {
      const int k = (int)std::min({e - i, TILE, room(first + i)});
      const float* x = load(base, type, i, k, w);
      float* out = type == F32 ? (float*)base + i : w;
      store(apply<N>(x, out, k, first + i, t, type, ends), k, base, type, i);
      i += k;
    }
  });
}

template <bool N> void fill(void* out, int type, int64_t n, int64_t first, Words k, int threads) {
  parallel(n, TILE, threads, n < SERIAL, [&](int64_t a, int64_t e) {
    alignas(64) float w[TILE];
    for (int64_t i = a; i < e;) {
      const int64_t at = first + i;
      const int c = (int)std::min({e - i, TILE, room(at)});
      const Stream s(k, at);
      for (int u = 0; u < c; u++) w[u] = s.at<N>(u);
      store(w, c, out, type, i);
      i += c;
    }
  });
}

}  // namespace

extern "C" {

// `key` points at two numbers: the noise key, and the index of the first element of `base`.

void zg_materialize(const void* base, void* plus, void* minus, int base_t, int out_t, int64_t n,
                    const int64_t* seeds, const float* coefs, const float* scales, int64_t r,
                    const int64_t* key, const int64_t* seed, const float* eps, int normal,
                    int threads) {
  const Job j{base, plus, minus, base_t, out_t, Terms(seeds, coefs, scales, r, *key),
              stream_words(*seed, *key), *eps};
  const int64_t first = key[1];
  parallel(n, TILE, threads, n * (r + 1) < SERIAL, [&](int64_t a, int64_t e) {
    if (normal) span<true>(j, first + a, a, a, e - a);
    else span<false>(j, first + a, a, a, e - a);
  });
}

// Rows `index` (int64, or int32 if narrow) of a table of `rows` rows of `width` elements.
// Returns -1, or the position of the first index out of range (then nothing is written).
int64_t zg_rows(const void* base, void* plus, void* minus, int base_t, int out_t,
                const void* index, int narrow, int64_t count, int64_t rows, int64_t width,
                const int64_t* seeds, const float* coefs, const float* scales, int64_t r,
                const int64_t* key, const int64_t* seed, const float* eps, int normal,
                int threads) {
  auto row = [&](int64_t i) {
    return narrow ? (int64_t)((const int32_t*)index)[i] : ((const int64_t*)index)[i];
  };
  for (int64_t i = 0; i < count; i++) if (row(i) < 0 || row(i) >= rows) return i;
  const Job j{base, plus, minus, base_t, out_t, Terms(seeds, coefs, scales, r, *key),
              stream_words(*seed, *key), *eps};
  parallel(count, 1, threads, count * width * (r + 1) < SERIAL, [&](int64_t a, int64_t e) {
    for (int64_t i = a; i < e; i++) {
      const int64_t at = row(i) * width, first = key[1] + at;
      if (normal) span<true>(j, first, at, i * width, width);
      else span<false>(j, first, at, i * width, width);
    }
  });
  return -1;
}

void zg_fold(void* base, int type, int64_t n, const int64_t* seeds, const float* coefs,
             const float* scales, int64_t r, int64_t key, int64_t first, const uint8_t* ends,
             int normal, int threads) {
  const Terms t(seeds, coefs, scales, r, key);
  if (normal) fold<true>(base, type, n, first, t, ends, threads);
  else fold<false>(base, type, n, first, t, ends, threads);
}

void zg_fill(void* out, int type, int64_t n, int64_t first, int64_t seed, int64_t key, int normal,
             int threads) {
  const Words k = stream_words(seed, key);
  if (normal) fill<true>(out, type, n, first, k, threads);
  else fill<false>(out, type, n, first, k, threads);
}
}
