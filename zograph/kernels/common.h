// What the kernels share: element types, 16-bit floats and the words of a noise stream.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t TILE = 4096;
constexpr int64_t SERIAL = 32768;  // below this many elements a parallel region costs more
enum DType { F32 = 0, BF16 = 1, F16 = 2 };

inline uint32_t bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline float real(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }

// ---- the stream of a seed and a key: zograph/noise.py's `stream_words` -------------------------
struct Words { uint32_t k0, k1, k2, k3; };

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

}  // namespace
