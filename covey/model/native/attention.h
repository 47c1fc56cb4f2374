// Attention over the paged pool: online softmax block by block (FlashAttention, Algorithm 1), each row by itself, so that
// a chunk's rows come out as if each had been decoded alone.
#pragma once
#include "team.h"
#include "vectors.h"

constexpr int QUERIES = 24;  // rows (tokens x heads of a group) that share a pass over the keys
#if defined(__AVX512VNNI__)
constexpr int QUERY_ROWS = 6;
#else
constexpr int QUERY_ROWS = 3;
#endif

enum PoolKind { POOL_F32 = 0, POOL_F16 = 1, POOL_I8 = 2 };

// A block is [layer][K pages, V pages of each kv head]. A K page is [head_dim][block_size], a V page [block_size][head_dim];
// POOL_I8 appends one scale a token to each page.
struct Pool {
  uint8_t* data;
  int64_t block_bytes, page_bytes;
  int32_t block_size, kv_heads, head_dim, kind;

  uint8_t* page(long block, long layer, long kind_of_page, long head) const {
    return data + block * block_bytes + ((layer * 2 + kind_of_page) * kv_heads + head) * page_bytes;
  }
  float* scales(uint8_t* page) const { return (float*)(page + (long)block_size * head_dim); }
};

// Rows of one step: row r has tokens first[r] .. first[r + 1], the first of which stands at position start[r].
struct Batch {
  int64_t rows, tokens;
  const int32_t* row_of;  // [token]
  const int32_t* first;
  const int32_t* start;
  const int32_t* table_first;
  const int32_t* tables;
  const float* phases;  // [token][head_dim]: cosine and sine of each adjacent pair
};

static inline void put(const Pool& pool, uint8_t* page, long i, float value, float inverse) {
  if (pool.kind == POOL_F32) ((float*)page)[i] = value;
  else if (pool.kind == POOL_F16) ((uint16_t*)page)[i] = _cvtss_sh(value, 0);
  else ((int8_t*)page)[i] = (int8_t)lrintf(value * inverse);
}

// Write the keys and values [kv head][head_dim] of one token into its slot.
static void scatter(const Pool& pool, long block, long slot, long layer, const float* keys, const float* values) {
  const long width = pool.head_dim, size = pool.block_size;
  for (long head = 0; head < pool.kv_heads; ++head) {
    uint8_t* k = pool.page(block, layer, 0, head);
    uint8_t* v = pool.page(block, layer, 1, head);
    float k_inverse = 0, v_inverse = 0;
    if (pool.kind == POOL_I8) {
      const float k_top = largest(keys + head * width, width), v_top = largest(values + head * width, width);
      pool.scales(k)[slot] = k_top / 127.0f;
      pool.scales(v)[slot] = v_top / 127.0f;
      k_inverse = k_top > 0 ? 127.0f / k_top : 0.0f;
      v_inverse = v_top > 0 ? 127.0f / v_top : 0.0f;
    }
    for (long d = 0; d < width; ++d) {
      put(pool, k, d * size + slot, keys[head * width + d], k_inverse);
      put(pool, v, slot * width + d, values[head * width + d], v_inverse);
    }
  }
}

static inline Eight widen8(const uint16_t* p) { return (Eight)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline Eight widen8(const int8_t* p) {
  return (Eight)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

// The page's floats: themselves, or widened into `room`.
static const float* read_page(const Pool& pool, uint8_t* page, bool keys, float* room) {
  const long count = (long)pool.block_size * pool.head_dim;
  if (pool.kind == POOL_F32) return (const float*)page;
  if (pool.kind == POOL_F16) {
    for (long i = 0; i < count; i += 8) store8(room + i, widen8((const uint16_t*)page + i));
    return room;
  }
  const float* scales = pool.scales(page);
  const int8_t* bytes = (const int8_t*)page;
  if (keys) {
    for (long i = 0; i < count; i += 8) store8(room + i, widen8(bytes + i) * load8(scales + i % pool.block_size));
  } else {
    for (long i = 0; i < count; i += 8) store8(room + i, widen8(bytes + i) * fill8(scales[i / pool.head_dim]));
  }
  return room;
}

// Memory that is due soon, asked for a little at a time while something else is computed.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;

  inline void step() {
    if (at >= end) return;
    _mm_prefetch(at, _MM_HINT_T1);
    _mm_prefetch(at + 64, _MM_HINT_T1);
    at += 128;
  }
};

// c[R][columns] (+)= a[R][depth] b[depth][columns]; a's rows begin `stride` apart.
template <int R, int V>
static inline void small_tile(const float* a, long stride, const float* b, long columns, long depth, float* c,
                              long c_stride, Ahead& ahead) {
  Eight sums[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = load8(c + r * c_stride + 8 * v);
  for (long i = 0; i < depth; ++i) {
    ahead.step();
    Eight loaded[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) loaded[v] = load8(b + i * columns + 8 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += a[r * stride + i] * loaded[v];
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store8(c + r * c_stride + 8 * v, sums[r][v]);
}

template <int R>
static void small_product(const float* a, long stride, const float* b, long columns, long depth, float* c,
                          long c_stride, Ahead& ahead) {
  long at = 0;
  for (; at + 32 <= columns; at += 32) small_tile<R, 4>(a, stride, b + at, columns, depth, c + at, c_stride, ahead);
  for (; at < columns; at += 8) small_tile<R, 1>(a, stride, b + at, columns, depth, c + at, c_stride, ahead);
}

template <int R>
static void small_rows(long rows, const float* a, long stride, const float* b, long columns, long depth, float* c,
                       long c_stride, Ahead& ahead) {
  if constexpr (R > 0) {
    while (rows >= R) {
      small_product<R>(a, stride, b, columns, depth, c, c_stride, ahead);
      rows -= R, a += R * stride, c += R * c_stride;
    }
    small_rows<R - 1>(rows, a, stride, b, columns, depth, c, c_stride, ahead);
  }
}

struct Queries {
  float q[QUERIES][256], o[QUERIES][256], s[QUERIES][256];
  float top[QUERIES], total[QUERIES];
  float keys[256 * 256], values[256 * 256];
};

// Take one block of scores into the running softmax: s becomes probabilities, o is scaled to the new maximum.
static inline void soften(float* s, long columns, float scale, long visible, float* top, float* total, float* o,
                          long width) {
  Eight best = fill8(-INFINITY);
  for (long i = 0; i < columns; i += 8) {
    Eight x = load8(s + i) * fill8(scale);
    if (i + 8 > visible)
      for (int j = 0; j < 8; ++j)
        if (i + j >= visible) x[j] = -INFINITY;
    store8(s + i, x);
    best = (Eight)_mm256_max_ps((__m256)best, (__m256)x);
  }
  const float block_top = max8(best), now = block_top > *top ? block_top : *top;
  Eight sum = fill8(0.0f);
  for (long i = 0; i < columns; i += 8) {
    const Eight p = exp8(load8(s + i) - fill8(now));
    store8(s + i, p);
    sum += p;
  }
  if (now != *top) {
    const Eight shrink = exp8(fill8(*top - now));
    *total *= shrink[0];
    for (long d = 0; d < width; d += 8) store8(o + d, load8(o + d) * shrink);
    *top = now;
  }
  *total += sum8(sum);
}

// Tokens `from` .. `to` of one row, one kv head and the query heads that share it.
static void attend(const Pool& pool, const Batch& batch, long row, long head, long from, long to, long layer,
                   long group, const float* qkv, long qkv_width, float* out, long out_width, Queries& work) {
  const long width = pool.head_dim, size = pool.block_size, tokens = to - from, rows = tokens * group;
  for (long i = 0; i < rows; ++i) {
    const float* q = qkv + (from + i / group) * qkv_width + (head * group + i % group) * width;
    memcpy(work.q[i], q, 4 * width);
    memset(work.o[i], 0, 4 * width);
    work.top[i] = -INFINITY, work.total[i] = 0.0f;
  }
  const float scale = 1.0f / sqrtf((float)width);
  const long position = batch.start[row] + (from - batch.first[row]), last = position + tokens;
  const int32_t* table = batch.tables + batch.table_first[row];
  for (long begin = 0; begin < last; begin += size) {
    const long block = table[begin / size], filled = last - begin < size ? last - begin : size;
    Ahead next_keys, next_values;
    const bool more = begin + size < last;
    if (more || head + 1 < pool.kv_heads) {
      const long then = more ? table[begin / size + 1] : table[0], whose = more ? head : head + 1;
      next_keys.at = (const char*)pool.page(then, layer, 0, whose);
      next_values.at = (const char*)pool.page(then, layer, 1, whose);
      next_keys.end = next_keys.at + pool.page_bytes, next_values.end = next_values.at + pool.page_bytes;
    }
    const float* keys = read_page(pool, pool.page(block, layer, 0, head), true, work.keys);
    const float* values = read_page(pool, pool.page(block, layer, 1, head), false, work.values);
    for (long i = 0; i < rows; ++i) memset(work.s[i], 0, 4 * size);
    small_rows<QUERY_ROWS>(rows, work.q[0], 256, keys, size, width, work.s[0], 256, next_keys);
    for (long i = 0; i < rows; ++i) {
      const long visible = position + i / group + 1 - begin;
      soften(work.s[i], size, scale, visible < size ? visible : size, &work.top[i], &work.total[i], work.o[i], width);
    }
    small_rows<QUERY_ROWS>(rows, work.s[0], 256, values, width, filled, work.o[0], 256, next_values);
  }
  for (long i = 0; i < rows; ++i) {
    float* target = out + (from + i / group) * out_width + (head * group + i % group) * width;
    const Eight total = fill8(work.total[i]);
    for (long d = 0; d < width; d += 8) store8(target + d, load8(work.o[i] + d) / total);
  }
}
