// One iteration of Anderson mixing on the CPU in two passes over memory: see zograph/kernels/mixing.py.
//
// Sums are taken in blocks of fixed size and added in order, so that no result depends on the number
// of threads.
#include <algorithm>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "common.h"

namespace {

typedef float vec __attribute__((vector_size(64)));
typedef uint16_t half __attribute__((vector_size(32)));
typedef uint32_t word __attribute__((vector_size(64)));
constexpr int LANES = 16;
constexpr int64_t BLOCK = 16 * TILE;  // elements that one thread takes at a time

inline vec read(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline vec read(const uint16_t* p) {
  half h; std::memcpy(&h, p, sizeof h);
  const word w = __builtin_convertvector(h, word) << 16;
  vec v; std::memcpy(&v, &w, sizeof v); return v;
}
inline float one(const float* p) { return *p; }
inline float one(const uint16_t* p) { return from_bf16(*p); }
inline void write(float* p, float x) { *p = x; }
inline void write(uint16_t* p, float x) { *p = to_bf16(x); }

// Store what is not read again soon past the caches, without reading the memory that it overwrites.
inline void stream(float* to, const float* from, int n) {
  int i = 0;
#ifdef __AVX512F__
  if ((uintptr_t)to % 64 == 0) {
    for (; i + LANES <= n; i += LANES) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
    _mm_sfence();
  }
#endif
  std::copy(from + i, from + n, to + i);
}

double total(const vec* sums, int n, float rest) {
  double sum = rest;
  for (int i = 0; i < n; i++) for (int j = 0; j < LANES; j++) sum += sums[i][j];
  return sum;
}

template <class P> double dot(const float* a, const P* b, int n) {
  vec sums[4] = {};
  int i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int k = 0; k < 4; k++) sums[k] += read(a + i + k * LANES) * read(b + i + k * LANES);
  float rest = 0;
  for (; i < n; i++) rest += a[i] * one(b + i);
  return total(sums, 4, rest);
}

// One block of one sample: r = f - z and f into the sample's slot, and the products of r.
template <class P>
void observe(const float* f, const float* z, float* values, P* residuals, int64_t slot,
             int64_t slots, int64_t width, int64_t from, int64_t to, double* sums) {
  alignas(64) float r[TILE];
  for (int64_t at = from; at < to; at += TILE) {
    const int n = (int)std::min(TILE, to - at);
    float* value = values + slot * width + at;
    P* residual = residuals + slot * width + at;
    for (int i = 0; i < n; i++) {
      r[i] = f[at + i] - z[at + i];
      write(residual + i, r[i]);
    }
    stream(value, f + at, n);
    for (int64_t s = 0; s < slots; s++) sums[s] += dot(r, residuals + s * width + at, n);
    sums[slots] += dot(r, r, n);
    sums[slots + 1] += dot(f + at, f + at, n);
  }
}

template <class P>
void observe_all(const float* f, const float* z, float* values, P* residuals, const int64_t* slot,
                 const uint8_t* active, int64_t batch, int64_t slots, int64_t width, int threads,
                 double* out) {
  const int64_t blocks = std::max<int64_t>(1, (width + BLOCK - 1) / BLOCK), row = slots + 2;
  std::vector<double> parts(batch * blocks * row, 0.0);
  const bool serial = threads < 2 || batch * width < SERIAL;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (!serial)
  for (int64_t i = 0; i < batch * blocks; i++) {
    const int64_t b = i / blocks, from = i % blocks * BLOCK, room = b * slots * width;
    if (!active[b]) continue;
    observe(f + b * width, z + b * width, values + room, residuals + room, slot[b], slots, width,
            from, std::min(width, from + BLOCK), parts.data() + i * row);
  }
  for (int64_t b = 0; b < batch; b++)
    for (int64_t s = 0; s < row; s++) {
      out[b * row + s] = 0;
      for (int64_t i = 0; i < blocks; i++) out[b * row + s] += parts[(b * blocks + i) * row + s];
    }
}

void norms_all(const float* f, const float* z, int64_t batch, int64_t width, int threads,
               double* out) {
  const int64_t blocks = std::max<int64_t>(1, (width + BLOCK - 1) / BLOCK);
  std::vector<double> parts(batch * blocks * 2, 0.0);
  const bool serial = threads < 2 || batch * width < SERIAL;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (!serial)
  for (int64_t i = 0; i < batch * blocks; i++) {
    alignas(64) float r[TILE];
    const int64_t b = i / blocks, from = i % blocks * BLOCK, to = std::min(width, from + BLOCK);
    for (int64_t at = b * width + from; at < b * width + to; at += TILE) {
      const int n = (int)std::min(TILE, b * width + to - at);
      for (int j = 0; j < n; j++) r[j] = f[at + j] - z[at + j];
      parts[2 * i] += dot(r, r, n);
      parts[2 * i + 1] += dot(f + at, f + at, n);
    }
  }
  for (int64_t b = 0; b < batch; b++)
    for (int64_t s = 0; s < 2; s++) {
      out[2 * b + s] = 0;
      for (int64_t i = 0; i < blocks; i++) out[2 * b + s] += parts[(b * blocks + i) * 2 + s];
    }
}

template <class P>
void mix_all(const double* weights, double damping, const float* values, const P* residuals,
             int64_t batch, int64_t slots, int64_t width, int threads, float* out) {
  const int64_t blocks = (width + BLOCK - 1) / BLOCK;
  const bool serial = threads < 2 || batch * width < SERIAL;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (!serial)
  for (int64_t i = 0; i < batch * blocks; i++) {
    const int64_t b = i / blocks, from = i % blocks * BLOCK, to = std::min(width, from + BLOCK);
    alignas(64) float sum[TILE];
    for (int64_t at = from; at < to; at += TILE) {
      const int n = (int)std::min(TILE, to - at);
      std::fill(sum, sum + n, 0.0f);
      for (int64_t s = 0; s < slots; s++) {
        const double weight = weights[b * slots + s];
        if (weight == 0) continue;  // whatever the slot holds
        const float a = (float)weight, c = (float)(weight * damping);
        const float* value = values + (b * slots + s) * width + at;
        const P* residual = residuals + (b * slots + s) * width + at;
        if (c == 0) for (int j = 0; j < n; j++) sum[j] += a * value[j];
        else for (int j = 0; j < n; j++) sum[j] += a * value[j] + c * one(residual + j);
      }
      stream(out + b * width + at, sum, n);
    }
  }
}

}  // namespace

extern "C" {

// `out` is double[batch, slots + 2]: the products of each sample's f - z with its residuals, the
// square of f - z and of f.  Samples that are not active are left alone; their sums are 0.
void zg_observe(const float* f, const float* z, float* values, void* residuals, int type,
                const int64_t* slot, const uint8_t* active, int64_t batch, int64_t slots,
                int64_t width, int threads, double* out) {
  if (type == F32)
    observe_all(f, z, values, (float*)residuals, slot, active, batch, slots, width, threads, out);
  else
    observe_all(f, z, values, (uint16_t*)residuals, slot, active, batch, slots, width, threads, out);
}

// `out` is double[batch, 2]: the square of each sample's f - z and of f.
void zg_norms(const float* f, const float* z, int64_t batch, int64_t width, int threads,
              double* out) {
  norms_all(f, z, batch, width, threads, out);
}

void zg_mix(const double* weights, double damping, const float* values, const void* residuals,
            int type, int64_t batch, int64_t slots, int64_t width, int threads, float* out) {
  if (type == F32)
    mix_all(weights, damping, values, (const float*)residuals, batch, slots, width, threads, out);
  else
    mix_all(weights, damping, values, (const uint16_t*)residuals, batch, slots, width, threads, out);
}

}  // extern "C"
