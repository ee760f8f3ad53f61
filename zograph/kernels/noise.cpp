// The CPU kernels: zograph/noise.py's definition, bit for bit, over cache tiles.
//
// Floating point: -ffp-contract=off and no fast-math, every + - * rounded on its own to float32.
// A tile is at most TILE elements and never crosses a 2^32 boundary of the element index, so the
// high index word is a constant of the tile.  Vectors are the compiler's own (vector_size), of the
// widest kind that the flags allow; the few intrinsics have a plain form beside them.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#include "common.h"

namespace {

#define INLINE inline __attribute__((always_inline))
constexpr int64_t AHEAD = 2048;  // bytes fetched ahead

// Elements from `at` to the next 2^32 boundary of the index.
inline int64_t room(int64_t at) { return (1ll << 32) - (at & 0xffffffffll); }

// ---- vectors: a group at a time, so that the chains of several registers overlap --------------
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int REGISTERS = 8;  // what they do not hold waits in the cache: faster than 2 or 4
constexpr int GROUP = LANES * REGISTERS;
#define EACH _Pragma("GCC unroll 8") for (int r = 0; r < REGISTERS; r++)
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef float F __attribute__((vector_size(4 * LANES)));
struct Group { F v[REGISTERS]; };

INLINE F load(const float* p) { F f; std::memcpy(&f, p, sizeof f); return f; }
INLINE void store(float* p, F f) { std::memcpy(p, &f, sizeof f); }

INLINE U xor3(U a, U b, U c) {
#if defined(__AVX512F__)
  return (U)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// sum + the two halves of each lane of x, as signed 16-bit integers.
INLINE I add_halves(I sum, U x) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, _mm512_set1_epi16(1));
#elif defined(__AVX512BW__)
  return sum + (I)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + (I)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#else
  return sum + ((I)(x << 16) >> 16) + ((I)x >> 16);
#endif
}

// A stream from the element index `start` on, as far as the high index word stays the same.
struct Stream {
  uint32_t lo, k0, k1, k1h, k2, k3h;
  int skew;  // of `start` in its group
  alignas(64) uint32_t lanes[GROUP];
  Stream(Words k, int64_t start) {
    uint32_t hi = (uint32_t)(start >> 32) * 0x9E3779B1u; hi ^= hi >> 16;
    skew = (int)(start & (GROUP - 1));
    lo = (uint32_t)start - skew; k0 = k.k0 & ~(uint32_t)(GROUP - 1); k1 = k.k1; k2 = k.k2;
    k1h = k.k1 ^ hi; k3h = k.k3 + hi;
    for (uint32_t i = 0; i < GROUP; i++) lanes[i] = (i ^ (k.k0 & (GROUP - 1))) * 0x9E3779B1u;
  }
  // The values of group g.  Its start is a multiple of GROUP, so (lo + i) ^ k0 is a sum of what
  // the group and what the lane decides, and the first product is a sum of two as well.
  template <bool NORMAL> INLINE Group at(int g) const {
    const uint32_t first = ((lo + (uint32_t)g * GROUP) ^ k0) * 0x9E3779B1u;
    const U half = U{} + 0x80008000u;  // makes two unsigned 16-bit integers signed ones
    U x[REGISTERS], y[REGISTERS], v[REGISTERS];
    I s[REGISTERS];
    F t[REGISTERS], q[REGISTERS], p[REGISTERS];
    Group out;
    EACH { std::memcpy(&x[r], lanes + LANES * r, sizeof(U)); x[r] += first; }
    EACH x[r] ^= x[r] >> 16;
    EACH x[r] = (x[r] + k1h) * 0x85EBCA6Bu;
    EACH x[r] ^= x[r] >> 15;
    EACH x[r] *= 0xC2B2AE35u;
    EACH y[r] = x[r] >> 16;
    if (NORMAL) EACH s[r] = add_halves(I{} + (6 * 32768 - 196605), xor3(x[r], y[r], half));
    EACH x[r] ^= y[r];
    EACH y[r] = (x[r] + k2) * 0x7FEB352Du;
    EACH y[r] = xor3(y[r], y[r] >> 15, U{} + k3h) * 0x846CA68Bu;
    EACH v[r] = y[r] >> 16;
    if (!NORMAL) {
      EACH out.v[r] = (F)(((y[r] ^ v[r]) & 0x80000000u) | 0x3F800000u);
      return out;
    }
    EACH s[r] = add_halves(s[r], xor3(y[r], v[r], half));
    EACH y[r] ^= v[r];
    EACH v[r] = (y[r] + k1) * 0x31848BABu;
    EACH v[r] = xor3(v[r], v[r] >> 14, x[r]) * 0x2C1B3C6Du;
    EACH s[r] = add_halves(s[r], xor3(v[r], v[r] >> 17, half));
    EACH t[r] = __builtin_convertvector(s[r], F) * 2.15791860e-05f;
    EACH q[r] = t[r] * t[r];
    EACH p[r] = q[r] * 3.57058025e-06f;
    EACH p[r] = (p[r] + -3.05405629e-05f) * q[r];
    EACH p[r] = (p[r] + 3.96967982e-04f) * q[r];
    EACH p[r] = (p[r] + 7.32545182e-03f) * q[r];
    EACH out.v[r] = (p[r] + 0.974835217f) * t[r];
    return out;
  }
};

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

// body(noise, x, y, z) for every group of the n elements from the stream's start on; a part of a
// group is made whole in buffers.  Meanwhile the lines AHEAD bytes further on are fetched of x, to
// be read, and of y and z, to be written (null: none).  The hardware's own prefetching stops at
// every page, and there memory would wait for arithmetic.  Fetching past an array's end does
// nothing.
template <bool N, class B>
INLINE void sweep(int n, const Stream& s, const float* x, float* y, float* z, B body) {
  auto line = [](const float* p) { return (const char*)((uintptr_t)p + AHEAD); };
  int g = 0, i = -s.skew;  // the group, and where it starts
  auto part = [&] {
    alignas(64) float a[3][GROUP] = {};
    const int from = std::max(i, 0), count = std::min(i + GROUP, n) - from, at = from - i;
    if (x) std::memcpy(a[0] + at, x + from, 4 * count);
    body(s.at<N>(g), a[0], a[1], a[2]);
    std::memcpy(y + from, a[1] + at, 4 * count);
    if (z) std::memcpy(z + from, a[2] + at, 4 * count);
    g++; i += GROUP;
  };
  if (i < 0) part();
  for (; i + GROUP <= n; i += GROUP, g++) {
    for (int u = i; u < i + GROUP; u += 16) {
      if (x) __builtin_prefetch(line(x + u), 0);
      if (y != x) __builtin_prefetch(line(y + u), 1);
      if (z) __builtin_prefetch(line(z + u), 1);
    }
    body(s.at<N>(g), x + i, y + i, z + i);
  }
  if (i < n) part();
}

template <bool N> void term(const float* w, float* out, int n, const Stream& s, float c) {
  sweep<N>(n, s, w, out, nullptr, [=](const Group& z, const float* w, float* out, float*) {
    EACH { const F d = c * z.v[r]; store(out + LANES * r, load(w + LANES * r) + d); }
  });
}
template <bool N> void term(const float* w, float* out, int n, const Stream& s, float c, float f) {
  sweep<N>(n, s, w, out, nullptr, [=](const Group& z, const float* w, float* out, float*) {
    EACH {
      const F d = c * z.v[r], a = f * load(w + LANES * r);
      store(out + LANES * r, a + d);
    }
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
  sweep<N>(n, s, w, p, m, [=](const Group& z, const float* w, float* p, float* m) {
    EACH {
      const F d = eps * z.v[r], a = load(w + LANES * r);
      store(p + LANES * r, a + d);
      store(m + LANES * r, a - d);
    }
  });
}
template <bool N> void minus(const float* w, float* m, int n, const Stream& s, float eps) {
  sweep<N>(n, s, w, m, nullptr, [=](const Group& z, const float* w, float* m, float*) {
    EACH { const F d = eps * z.v[r]; store(m + LANES * r, load(w + LANES * r) - d); }
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

// f(begin, end) over [0, n), in blocks of `grain` elements, on up to `threads` threads, which take
// `chunk` blocks at a time.
template <class F>
void parallel(int64_t n, int64_t grain, int threads, bool serial, F f, int chunk = 8) {
  const int64_t blocks = (n + grain - 1) / grain;
  if (serial || threads < 2 || blocks < 2) { if (n > 0) f((int64_t)0, n); return; }
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (int64_t b = 0; b < blocks; b++) f(b * grain, std::min(n, (b + 1) * grain));
}

template <bool N>
void fold(void* base, int type, int64_t n, int64_t first, const Terms& t, const uint8_t* ends,
          int threads) {
  const int64_t terms = (int64_t)t.words.size();
  parallel(n, TILE, threads, n * terms < SERIAL, [&](int64_t a, int64_t e) {
    alignas(64) float w[TILE];
    for (int64_t i = a; i < e;) {
      const int k = (int)std::min({e - i, TILE, room(first + i)});
      const float* x = load(base, type, i, k, w);
      float* out = type == F32 ? (float*)base + i : w;
      store(apply<N>(x, out, k, first + i, t, type, ends), k, base, type, i);
      i += k;
    }
  }, terms < 8 ? 8 : 1);
}

template <bool N> void fill(void* out, int type, int64_t n, int64_t first, Words k, int threads) {
  parallel(n, TILE, threads, n < SERIAL, [&](int64_t a, int64_t e) {
    alignas(64) float w[TILE];
    for (int64_t i = a; i < e;) {
      const int64_t at = first + i;
      const int c = (int)std::min({e - i, TILE, room(at)});
      const Stream s(k, at);
      float* z = type == F32 ? (float*)out + i : w;
      sweep<N>(c, s, nullptr, z, nullptr, [](const Group& z, const float*, float* out, float*) {
        EACH store(out + LANES * r, z.v[r]);
      });
      store(z, c, out, type, i);
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
