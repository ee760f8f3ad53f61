// Stored formats of weights: zograph/codec.py's definition, bit for bit, over cache tiles.
//
// Compiled like noise.cpp, every operation rounded on its own.  The noise comes from noise.cpp's
// zg_fill, whose address the caller passes, so that there is one definition of it in C++.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // comparisons may be vectorised; no result depends on it
#endif
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include "common.h"

namespace {

constexpr int BLOCK = 128;
static_assert(TILE % BLOCK == 0, "a tile holds whole blocks");
enum Format { S_BF16 = 0, S_F16 = 1, S_E4M3 = 2, S_E5M2 = 3, S_I8 = 4 };
using Fill = void (*)(void*, int, int64_t, int64_t, int64_t, int64_t, int, int);

// ---- the stream of rounding bits: codec.py's `rounding_bits` ---------------------------------
// The words of elements `first`, `first + 1`, ...; `out` null: none are wanted.
void rounding_bits(Words k, int64_t first, int n, uint32_t* out) {
  for (int i = 0; i < n;) {
    const int64_t at = first + i;
    const int64_t run = std::min<int64_t>(n - i, (1ll << 32) - (at & 0xffffffffll));
    uint32_t hi = (uint32_t)(at >> 32) * 0x9E3779B1u; hi ^= hi >> 16;
    const uint32_t lo = (uint32_t)at, k1 = k.k1 ^ hi, k3 = k.k3 + hi;
    for (int u = 0; u < (int)run; u++) {
      uint32_t x = ((lo + (uint32_t)u) ^ k.k0) * 0x9E3779B1u; x ^= x >> 16;
      x = (x + k1) * 0x85EBCA6Bu; x ^= x >> 15;
      x *= 0xC2B2AE35u; x ^= x >> 16;
      uint32_t y = (x + k.k2) * 0x7FEB352Du; y ^= y >> 15;
      y = (y ^ k3) * 0x846CA68Bu; y ^= y >> 16;
      out[i + u] = y;
    }
    i += (int)run;
  }
}
inline float unit(uint32_t y) { return (float)(int32_t)(y >> 8) * 0x1p-24f; }

inline float whole(float v) { return (v + 12582912.0f) - 12582912.0f; }  // ties to even

// ---- one element of a stored float format ----------------------------------------------------
struct Bf16 {
  using T = uint16_t;
  static float read(T h) { return from_bf16(h); }
  static T write(float v) { return to_bf16(v); }
  static constexpr float largest = 0x1.fep127f;
  template <bool S> static float round(float v, uint32_t y) {  // v is within `largest`
    return S ? real((bits(v) + (y >> 16)) & 0xffff0000u) : from_bf16(to_bf16(v));
  }
};

// M bits of significand behind the leading one, smallest normal 2^E.
template <int M, int E> struct Small {
  template <bool S> static float round(float v, uint32_t y, float largest) {
    const float a = std::fabs(v);
    const uint32_t e = std::max(bits(a) & 0x7f800000u, (uint32_t)(127 + E) << 23);
    const uint32_t q = e - ((uint32_t)M << 23);  // the distance of neighbours, a power of two
    const float t = a * real((254u << 23) - q);
    const float f = std::floor(t);
    const float r = S ? f + (float)(unit(y) < t - f) : whole(t);
    return std::copysign(std::min(r * real(q), largest), v);
  }
};
struct Half {
  using T = uint16_t;
  static float read(T h) { return from_f16(h); }
  static T write(float v) { return to_f16(v); }
  static constexpr float largest = 65504.0f;
  template <bool S> static float round(float v, uint32_t y) {
    return Small<10, -14>::round<S>(v, y, largest);
  }
};
struct E5M2 {  // the upper byte of a float16
  using T = uint8_t;
  static float read(T b) { return from_f16((uint16_t)(b << 8)); }
  static T write(float v) { return (T)(to_f16(v) >> 8); }
  static constexpr float largest = 57344.0f;
  template <bool S> static float round(float v, uint32_t y) {
    return Small<2, -14>::round<S>(v, y, largest);
  }
};
struct E4M3 {
  using T = uint8_t;
  static float read(T b) {
    const uint32_t m = (uint32_t)(b & 0x7fu) << 20, sign = (uint32_t)(b & 0x80u) << 24;
    const float small = real(m + 0x3c800000u) - real(0x3c800000u);
    return real(sign | (m < 0x00800000u ? bits(small) : m + 0x3c000000u));
  }
  static T write(float v) {  // v is a number of the format
    const uint32_t a = bits(v) & 0x7fffffffu;
    const uint32_t small = (uint32_t)(int32_t)(real(a < 0x3c800000u ? a : 0u) * 512.0f);
    return (T)((bits(v) >> 24 & 0x80u) | (a < 0x3c800000u ? small : (a - 0x3c000000u) >> 20));
  }
  static constexpr float largest = 448.0f;
  template <bool S> static float round(float v, uint32_t y) {
    return Small<3, -6>::round<S>(v, y, largest);
  }
};

struct Counts { int64_t clipped = 0, nan = 0; };

template <class F, bool S> void round_floats(float* w, int n, const uint32_t* y, Counts& c) {
  int clipped = 0, nan = 0;
  for (int i = 0; i < n; i++) {
    const float v = w[i], a = std::fabs(v);
    clipped += a > F::largest;
    nan += v != v;
    const float in = a > F::largest ? std::copysign(F::largest, v) : v == v ? v : 0.0f;
    w[i] = F::template round<S>(in, S ? y[i] : 0u);
  }
  c.clipped += clipped; c.nan += nan;
}

// ---- int8, a scale for each block ------------------------------------------------------------
inline float scale_of(float most, int type) {
  const float s = most / 127.0f;
  if (s < (type == F16 ? 0x1p-24f : 0x1p-100f)) return 0.0f;
  return real(type == F32 ? bits(s) & ~0x7fu : (bits(s) + 0x7fffffu) & 0x7f800000u);
}
inline float value_of(float q, float s, int type) {
  const float v = q * s, most = type == F32 ? FLT_MAX : type == F16 ? 65504.0f : 0x1.fep127f;
  return std::min(std::max(v, -most), most);  // 64 times a power of two may be beyond
}
// Rounds a block: keeps its integers, if they are wanted, else the values; returns its scale.
template <bool S>
float round_block(float* w, int n, const uint32_t* y, int type, int8_t* keep, Counts& c) {
  int clipped = 0, nan = 0;
  int32_t size = 0;  // of the largest element, as bits: integers are compared many at a time
  for (int i = 0; i < n; i++) {
    const float v = w[i], a = std::fabs(v);
    clipped += a > FLT_MAX;
    nan += v != v;
    w[i] = a > FLT_MAX ? std::copysign(FLT_MAX, v) : v == v ? v : 0.0f;
    size = std::max(size, (int32_t)(bits(w[i]) & 0x7fffffffu));
  }
  c.clipped += clipped; c.nan += nan;
  const float s = scale_of(real(size), type), by = s > 0.0f ? s : 1.0f;
  for (int i = 0; i < n; i++) {
    const float t = s > 0.0f ? w[i] / by : 0.0f, f = std::floor(t);
    const float q = S ? f + (float)(unit(y[i]) < t - f) : whole(t);
    w[i] = std::min(std::max(q, -127.0f), 127.0f) + 0.0f;  // no negative zero
  }
  if (keep) for (int i = 0; i < n; i++) keep[i] = (int8_t)(int32_t)w[i];
  else for (int i = 0; i < n; i++) w[i] = value_of(w[i], s, type);
  return s;
}

// ---- tiles -----------------------------------------------------------------------------------
template <class F> void read_floats(const uint8_t* p, int64_t at, int n, float* w) {
  const typename F::T* h = (const typename F::T*)p + at;
  for (int i = 0; i < n; i++) w[i] = F::read(h[i]);
}
template <class F> void write_floats(const float* w, int64_t at, int n, uint8_t* p) {
  typename F::T* h = (typename F::T*)p + at;
  for (int i = 0; i < n; i++) h[i] = F::write(w[i]);
}
inline int64_t blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

void unpack(const uint8_t* p, int format, int64_t total, int64_t at, int n, int type, float* w) {
  switch (format) {
    case S_BF16: return read_floats<Bf16>(p, at, n, w);
    case S_F16: return read_floats<Half>(p, at, n, w);
    case S_E4M3: return read_floats<E4M3>(p, at, n, w);
    case S_E5M2: return read_floats<E5M2>(p, at, n, w);
  }
  const float* scales = (const float*)p + at / BLOCK;
  const int8_t* q = (const int8_t*)(p + 4 * blocks(total)) + at;
  for (int b = 0; b * BLOCK < n; b++)
    for (int i = b * BLOCK; i < std::min(n, (b + 1) * BLOCK); i++)
      w[i] = value_of((float)q[i], scales[b], type);
}

template <bool S>
void round_tile(float* w, int n, const uint32_t* y, int format, int type, Counts& c) {
  switch (format) {
    case S_BF16: return round_floats<Bf16, S>(w, n, y, c);
    case S_F16: return round_floats<Half, S>(w, n, y, c);
    case S_E4M3: return round_floats<E4M3, S>(w, n, y, c);
    case S_E5M2: return round_floats<E5M2, S>(w, n, y, c);
  }
  for (int i = 0; i < n; i += BLOCK)
    round_block<S>(w + i, std::min(BLOCK, n - i), S ? y + i : nullptr, type, nullptr, c);
}

void pack(float* w, int n, int format, int type, int64_t total, int64_t at, uint8_t* p, Counts& c) {
  if (format == S_I8) {
    float* scales = (float*)p + at / BLOCK;
    int8_t* q = (int8_t*)(p + 4 * blocks(total)) + at;
    for (int i = 0; i < n; i += BLOCK)
      scales[i / BLOCK] =
          round_block<false>(w + i, std::min(BLOCK, n - i), nullptr, type, q + i, c);
    return;
  }
  round_tile<false>(w, n, nullptr, format, type, c);
  switch (format) {
    case S_BF16: return write_floats<Bf16>(w, at, n, p);
    case S_F16: return write_floats<Half>(w, at, n, p);
    case S_E4M3: return write_floats<E4M3>(w, at, n, p);
    case S_E5M2: return write_floats<E5M2>(w, at, n, p);
  }
}

void load(const void* p, int type, int64_t at, int n, float* w) {
  const uint16_t* h = (const uint16_t*)p + at;
  if (type == F32) std::memcpy(w, (const float*)p + at, 4 * n);
  else if (type == BF16) for (int i = 0; i < n; i++) w[i] = from_bf16(h[i]);
  else for (int i = 0; i < n; i++) w[i] = from_f16(h[i]);
}
void store(const float* w, int n, void* p, int type, int64_t at) {
  uint16_t* h = (uint16_t*)p + at;
  if (type == F32) { if (w != (float*)p + at) std::memcpy((float*)p + at, w, 4 * n); }
  else if (type == BF16) for (int i = 0; i < n; i++) h[i] = to_bf16(w[i]);
  else for (int i = 0; i < n; i++) h[i] = to_f16(w[i]);
}

template <class F> void parallel(int64_t n, int threads, F f) {
  const int64_t tiles = (n + TILE - 1) / TILE;
  const bool serial = threads < 2 || n < SERIAL;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) if (!serial)
  for (int64_t b = 0; b < tiles; b++) f(b * TILE, (int)std::min(TILE, n - b * TILE));
}

struct Total {
  std::atomic<int64_t> clipped{0}, nan{0};
  void add(const Counts& c) {
    if (c.clipped) clipped += c.clipped;
    if (c.nan) nan += c.nan;
  }
  void to(int64_t* out) { out[0] = clipped; out[1] = nan; }
};

}  // namespace

extern "C" {

// `out` becomes the stored weight with its r terms; the noise index of its first element is
// `first`.  Behind the terms marked in `ends` it is rounded to the format.
void zg_decode(const uint8_t* stored, int format, int64_t n, void* out, int type, int64_t first,
               const int64_t* seeds, const float* coefs, const float* scales, int64_t r,
               int64_t key, const uint8_t* ends, int64_t salt, int stochastic, int normal,
               int threads, Fill fill, int64_t* counts) {
  Total total;
  parallel(n, threads, [&](int64_t at, int k) {
    alignas(64) float tile[TILE], z[TILE];
    alignas(64) uint32_t y[TILE];
    float* w = type == F32 ? (float*)out + at : tile;
    Counts c;
    unpack(stored, format, n, at, k, type, w);
    for (int64_t j = 0; j < r; j++) {
      fill(z, F32, k, first + at, seeds[j], key, normal, 1);
      const float coef = coefs[j];
      if (scales) {
        const float scale = scales[j];
        for (int i = 0; i < k; i++) { const float d = coef * z[i], a = scale * w[i]; w[i] = a + d; }
      } else {
        for (int i = 0; i < k; i++) { const float d = coef * z[i]; w[i] = w[i] + d; }
      }
      if (!ends[j]) continue;
      if (stochastic) {
        rounding_bits(stream_words(seeds[j] ^ salt, key), first + at, k, y);
        round_tile<true>(w, k, y, format, type, c);
      } else {
        round_tile<false>(w, k, nullptr, format, type, c);
      }
    }
    store(w, k, out, type, at);
    total.add(c);
  });
  total.to(counts);
}

void zg_encode(const void* weight, int type, int64_t n, int format, uint8_t* stored, int threads,
               int64_t* counts) {
  Total total;
  parallel(n, threads, [&](int64_t at, int k) {
    alignas(64) float w[TILE];
    Counts c;
    load(weight, type, at, k, w);
    pack(w, k, format, type, n, at, stored, c);
    total.add(c);
  });
  total.to(counts);
}
}
