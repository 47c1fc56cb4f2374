// Products with packed weights. Each output is one chain of multiply-adds over the inputs in their order, whatever rows
// are computed beside it: a row's result does not depend on its batch.
#pragma once
#include <vector>

#include "team.h"
#include "vectors.h"

constexpr int PANEL = 32;  // outputs that are computed together
constexpr int GROUP = 64;  // inputs that share an activation's scale
constexpr int VECTORS = PANEL / LANES;

enum Kind { F32 = 0, BF16 = 1, I8 = 2 };
enum Then { STORE = 0, ADD = 1, GATE = 2 };

// F32, BF16: [panel][input][32]. I8: [panel][input / 4][32][4] with one scale an output, inputs padded to four.
struct Matrix {
  const void* data;
  const float* scale;
  const float* bias;
  int64_t outputs, inputs;
  int32_t kind;
};

// The rows of a product, cut into even tiles of at most ROWS, in the order in which the tile's kernel reads them:
// [input][row of the tile] of floats, or [input / 4][row][4] of bytes with a scale and a sum for each group.
struct Packed {
  float* values;
  int8_t* bytes;
  float* scales;
  int32_t* sums;
};

static inline long up(long n, long unit) { return (n + unit - 1) / unit; }

struct Tiles {
  long rows, count;
  explicit Tiles(long n) : rows(n), count(up(n, ROWS)) {}
  long first(long tile) const { return rows * tile / count; }
  long of(long row) const {
    long tile = row * count / rows;
    while (first(tile + 1) <= row) ++tile;
    return tile;
  }
};

static inline void pack_floats(const Packed& to, const Tiles& tiles, long row, const float* x, long inputs) {
  const long tile = tiles.of(row), first = tiles.first(tile), height = tiles.first(tile + 1) - first;
  float* out = to.values + first * inputs + (row - first);
  for (long i = 0; i < inputs; ++i) out[i * height] = x[i];
}

// Symmetric bytes in groups of up to 64 inputs; the sum corrects for weights that are shifted to be unsigned.
static inline void pack_bytes(const Packed& to, const Tiles& tiles, long row, const float* x, long inputs) {
  const long tile = tiles.of(row), first = tiles.first(tile), height = tiles.first(tile + 1) - first;
  const long groups = up(inputs, GROUP);
  int8_t* out = to.bytes + 4 * (first * up(inputs, 4) + (row - first));
  for (long g = 0; g < groups; ++g) {
    const long begin = g * GROUP, count = begin + GROUP < inputs ? GROUP : inputs - begin;
    float padded[GROUP] = {};
    memcpy(padded, x + begin, 4 * count);
    const float top = largest(padded, GROUP), inverse = top > 0 ? 127.0f / top : 0.0f;
    int32_t whole[GROUP], sum = 0;
    int8_t bytes[GROUP];
    for (long i = 0; i < GROUP; i += 8)
      _mm256_storeu_si256((__m256i*)(whole + i), _mm256_cvtps_epi32((__m256)(load8(padded + i) * fill8(inverse))));
    for (long i = 0; i < GROUP; ++i) sum += whole[i];
    for (long i = 0; i < GROUP; ++i) bytes[i] = (int8_t)whole[i];
    for (long quad = 0; quad < up(count, 4); ++quad, out += 4 * height) memcpy(out, bytes + 4 * quad, 4);
    to.scales[first * groups + g * height + (row - first)] = top / 127.0f;
    to.sums[first * groups + g * height + (row - first)] = sum;
  }
}

static inline void pack_row(const Packed& to, const Tiles& tiles, long row, const float* x, const Matrix& m) {
  if (m.kind == I8) pack_bytes(to, tiles, row, x, m.inputs);
  else pack_floats(to, tiles, row, x, m.inputs);
}

static inline Floats widen(const float* w) { return *(const LooseFloats*)w; }
static inline Floats widen(const uint16_t* w) {
#if defined(__AVX512VNNI__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)w)), 16);
#else
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)w)), 16);
#endif
}

template <int R, class W>
static void tile_floats(const float* x, const W* w, long inputs, float (*out)[PANEL]) {
  Floats sums[R][VECTORS] = {};
  for (long i = 0; i < inputs; ++i, w += PANEL, x += R) {
    Floats weights[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) weights[v] = widen(w + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += x[r] * weights[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) *(LooseFloats*)(out[r] + v * LANES) = sums[r][v];
}

// Add four products of bytes to each lane; exact.
static inline Ints dot4(Ints sum, Ints weights, int32_t x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
#else
  // |w| * sign(x, w): pairs stay below 2 * 127 * 127, so that nothing saturates.
  const __m256i w = (__m256i)weights;
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(x), w));
  return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

template <int R>
static void tile_bytes(const int8_t* x, const float* scales, const int32_t* corrections, const int8_t* w, long inputs,
                       float (*out)[PANEL]) {
  Floats total[R][VECTORS] = {};
  for (long begin = 0; begin < inputs; begin += GROUP, scales += R, corrections += R) {
    const long quads = up(begin + GROUP < inputs ? GROUP : inputs - begin, 4);
    Ints sums[R][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
#if defined(__AVX512VNNI__)
        sums[r][v] = Ints{} - 128 * corrections[r];  // the weights are multiplied as w + 128
#else
        sums[r][v] = Ints{};
#endif
      }
    for (long q = 0; q < quads; ++q, w += 4 * PANEL, x += 4 * R) {
      Ints weights[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        weights[v] = *(const LooseInts*)(w + 4 * v * LANES);
#if defined(__AVX512VNNI__)
        weights[v] ^= Ints{} + (int32_t)0x80808080;
#endif
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        int32_t quad;
        memcpy(&quad, x + 4 * r, 4);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = dot4(sums[r][v], weights[v], quad);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) total[r][v] += scales[r] * __builtin_convertvector(sums[r][v], Floats);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECTORS; ++v) *(LooseFloats*)(out[r] + v * LANES) = total[r][v];
}

template <int R>
static void tile(const Matrix& m, const Packed& x, long first, long panel, float (*out)[PANEL]) {
  if (m.kind == F32) {
    tile_floats<R>(x.values + first * m.inputs, (const float*)m.data + panel * m.inputs * PANEL, m.inputs, out);
  } else if (m.kind == BF16) {
    tile_floats<R>(x.values + first * m.inputs, (const uint16_t*)m.data + panel * m.inputs * PANEL, m.inputs, out);
  } else {
    const long quads = up(m.inputs, 4), groups = up(m.inputs, GROUP);
    tile_bytes<R>(x.bytes + 4 * first * quads, x.scales + first * groups, x.sums + first * groups,
                  (const int8_t*)m.data + panel * quads * 4 * PANEL, m.inputs, out);
  }
}

typedef void (*TileKernel)(const Matrix&, const Packed&, long, long, float (*)[PANEL]);

template <int R>
static TileKernel tile_of_height(long height) {
  if constexpr (R == 0) return nullptr;
  else return height == R ? tile<R> : tile_of_height<R - 1>(height);
}

// What becomes of a tile's outputs. GATE: a panel holds 16 gates, then the 16 values that they open (SwiGLU).
static inline void finish(const Matrix& m, Then then, long row, long panel, float* sums, float* out) {
  const long first = panel * PANEL, count = m.outputs - first < PANEL ? m.outputs - first : PANEL;
  if (m.kind == I8)
    for (long i = 0; i < count; ++i) sums[i] *= m.scale[first + i];
  if (m.bias)
    for (long i = 0; i < count; ++i) sums[i] += m.bias[first + i];
  if (then == GATE) {
    float* target = out + row * (m.outputs / 2) + first / 2;
    const long half = PANEL / 2, width = m.outputs / 2 - first / 2 < half ? m.outputs / 2 - first / 2 : half;
    float gated[PANEL / 2];
    for (long i = 0; i < half; i += 8) {
      const Eight gate = load8(sums + i);
      store8(gated + i, gate / (fill8(1.0f) + exp8(-gate)) * load8(sums + half + i));
    }
    memcpy(target, gated, 4 * width);
  } else if (then == ADD) {
    for (long i = 0; i < count; ++i) out[row * m.outputs + first + i] += sums[i];
  } else {
    memcpy(out + row * m.outputs + first, sums, 4 * count);
  }
}

// A panel of halves as floats: widened once where several tiles read it.
static const float* widen_panel(const Matrix& m, long panel) {
  static thread_local std::vector<float> room;
  if ((long)room.size() < m.inputs * PANEL) room.resize(m.inputs * PANEL);
  const uint16_t* w = (const uint16_t*)m.data + panel * m.inputs * PANEL;
  for (long i = 0; i < m.inputs * PANEL; i += LANES) *(LooseFloats*)(room.data() + i) = widen(w + i);
  return room.data();
}

// out[row] (+)= W x[row] for all rows; each member of the team takes panels until none is left.
static void product(Team& team, const Matrix& m, const Packed& x, const Tiles& tiles, Then then, float* out) {
  const long panels = up(m.outputs, PANEL);
  const long bytes = m.inputs * PANEL * (m.kind == F32 ? 4 : m.kind == BF16 ? 2 : 1);
  const long run = bytes >= 65536 ? 1 : up(65536, bytes);
  for (long begin; (begin = team.take(run)) < panels;) {
    const long end = begin + run < panels ? begin + run : panels;
    for (long panel = begin; panel < end; ++panel) {
      Matrix wide = m;
      if (m.kind == BF16 && tiles.count > 1) {
        wide.kind = F32;
        wide.data = widen_panel(m, panel) - panel * m.inputs * PANEL;
      }
      for (long t = 0; t < tiles.count; ++t) {
        const long first = tiles.first(t), height = tiles.first(t + 1) - first;
        float sums[ROWS][PANEL];
        tile_of_height<ROWS>(height)(wide, x, first, panel, sums);
        for (long r = 0; r < height; ++r) finish(m, then, first + r, panel, sums[r], out);
      }
    }
  }
}
