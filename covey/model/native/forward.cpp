// The layers of a Llama-family decoder over one ragged batch, on x86 with AVX2 or AVX-512.
#include <omp.h>

#include <memory>
#include <vector>

#include "attention.h"
#include "product.h"

struct Layer {
  const float* attn_norm;
  Matrix qkv;
  const float* q_norm;
  const float* k_norm;
  Matrix o;
  const float* mlp_norm;
  Matrix gate_up;
  Matrix down;
};

struct Model {
  const Layer* layers;
  const float* final_norm;
  Matrix head;
  int32_t hidden, heads;
  float eps;
};

// What a step works in, for as many tokens as it has.
struct Room {
  Packed packed;
  float* rows;  // [token][the wider of qkv and intermediate]
  float* attended;
};

// What one thread works in; kept for its life, because a step should not allocate.
struct Desk {
  Queries queries;
  std::vector<float> row;
};

static Desk& desk(long width) {
  static thread_local std::unique_ptr<Desk> mine;
  if (!mine) mine.reset(new Desk);
  if ((long)mine->row.size() < width) mine->row.resize(width);
  return *mine;
}

static void normalise(const float* x, const float* weight, long n, float eps, float* out) {
  Eight squares = fill8(0.0f);
  long i = 0;
  for (; i + 8 <= n; i += 8) squares += load8(x + i) * load8(x + i);
  float sum = sum8(squares);
  for (; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / sqrtf(sum / (float)n + eps);
  for (i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// Pack each row for the product with `m`, normalised when there is a norm.
static void pack(Team& team, const Matrix& m, const float* x, long stride, const float* norm, float eps,
                 const Packed& to, const Tiles& tiles, float* room) {
  for (long row; (row = team.take(1)) < tiles.rows;) {
    const float* values = x + row * stride;
    if (norm) normalise(values, norm, m.inputs, eps, room), values = room;
    pack_row(to, tiles, row, values, m);
  }
}

// Normalise the heads where the model asks for it, turn queries and keys, and write keys and values to the pool.
static void place(Team& team, const Model& model, const Layer& layer, const Pool& pool, const Batch& batch, long index,
                  float* qkv) {
  const long width = pool.head_dim, turning = model.heads + pool.kv_heads;
  const long stride = (turning + pool.kv_heads) * width;
  for (long token; (token = team.take(1)) < batch.tokens;) {
    float* heads = qkv + token * stride;
    const float* phases = batch.phases + token * width;
    for (long head = 0; head < turning; ++head) {
      float* x = heads + head * width;
      if (layer.q_norm) normalise(x, head < model.heads ? layer.q_norm : layer.k_norm, width, model.eps, x);
      for (long d = 0; d < width; d += 2) {
        const float a = x[d], b = x[d + 1], c = phases[d], s = phases[d + 1];
        x[d] = a * c - b * s;
        x[d + 1] = a * s + b * c;
      }
    }
    const long row = batch.row_of[token], position = batch.start[row] + (token - batch.first[row]);
    const long block = batch.tables[batch.table_first[row] + position / pool.block_size];
    scatter(pool, block, position % pool.block_size, index, heads + model.heads * width, heads + turning * width);
  }
}

// Attention in pieces of one kv head and at most QUERIES rows; the pieces of long chunks come late first.
static void attend_all(Team& team, const Model& model, const Pool& pool, const Batch& batch, long index,
                       const float* qkv, float* out, Queries& work) {
  const long group = model.heads / pool.kv_heads, tile = QUERIES / group > 0 ? QUERIES / group : 1;
  const long stride = (model.heads + 2 * pool.kv_heads) * pool.head_dim;
  const long heads = batch.rows >= 4 * team.size ? pool.kv_heads : 1, shares = pool.kv_heads / heads;
  long piece = team.take(1), seen = 0;
  for (long row = batch.rows - 1; row >= 0; --row) {
    const long tokens = batch.first[row + 1] - batch.first[row], tiles = up(tokens, tile);
    for (; piece < seen + tiles * shares; piece = team.take(1)) {
      const long t = tiles - 1 - (piece - seen) / shares, share = (piece - seen) % shares;
      const long from = batch.first[row] + t * tile;
      const long to = from + tile < batch.first[row + 1] ? from + tile : batch.first[row + 1];
      for (long head = share * heads; head < (share + 1) * heads; ++head)
        attend(pool, batch, row, head, from, to, index, group, qkv, stride, out, model.heads * pool.head_dim, work);
    }
    seen += tiles * shares;
  }
}

static void run_layer(Team& team, const Model& model, const Pool& pool, const Batch& batch, long index, float* hidden,
                      const Room& room, const Tiles& tiles, Desk& desk) {
  const Layer& layer = model.layers[index];
  const long attended_width = (long)model.heads * pool.head_dim;
  pack(team, layer.qkv, hidden, model.hidden, layer.attn_norm, model.eps, room.packed, tiles, desk.row.data());
  team.meet();
  product(team, layer.qkv, room.packed, tiles, STORE, room.rows);
  team.meet();
  place(team, model, layer, pool, batch, index, room.rows);
  team.meet();
  attend_all(team, model, pool, batch, index, room.rows, room.attended, desk.queries);
  team.meet();
  pack(team, layer.o, room.attended, attended_width, nullptr, model.eps, room.packed, tiles, desk.row.data());
  team.meet();
  product(team, layer.o, room.packed, tiles, ADD, hidden);
  team.meet();
  pack(team, layer.gate_up, hidden, model.hidden, layer.mlp_norm, model.eps, room.packed, tiles, desk.row.data());
  team.meet();
  product(team, layer.gate_up, room.packed, tiles, GATE, room.rows);
  team.meet();
  pack(team, layer.down, room.rows, layer.gate_up.outputs / 2, nullptr, model.eps, room.packed, tiles, desk.row.data());
  team.meet();
  product(team, layer.down, room.packed, tiles, ADD, hidden);
  team.meet();
}

// Run `work` on a team of `threads`, or of as many as the system grants.
template <class Work>
static void together(int32_t threads, const Work& work) {
  Team team;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    team.size = omp_get_num_threads();
    work(team);
  }
}

extern "C" {

// Run layers first .. last over `hidden` [token][hidden] in place.
void covey_forward(const Model* model, const Pool* pool, const Batch* batch, const Room* room, float* hidden,
                   int32_t first, int32_t last, int32_t threads) {
  const Tiles tiles(batch->tokens);
  together(threads, [&](Team& team) {
    Desk& mine = desk(model->hidden);
    for (long index = first; index < last; ++index)
      run_layer(team, *model, *pool, *batch, index, hidden, *room, tiles, mine);
  });
}

// Logits [row][vocab] of the final hidden states [row][hidden].
void covey_head(const Model* model, const Room* room, const float* hidden, int64_t rows, float* logits,
                int32_t threads) {
  const Tiles tiles(rows);
  together(threads, [&](Team& team) {
    pack(team, model->head, hidden, model->hidden, model->final_norm, model->eps, room->packed, tiles,
         desk(model->hidden).row.data());
    team.meet();
    product(team, model->head, room->packed, tiles, STORE, logits);
  });
}

// out [row][outputs] = x [row][inputs] times the matrix: for tests and measurements.
void covey_product(const Matrix* m, const Room* room, const float* x, int64_t rows, float* out, int32_t threads) {
  const Tiles tiles(rows);
  together(threads, [&](Team& team) {
    pack(team, *m, x, m->inputs, nullptr, 0.0f, room->packed, tiles, nullptr);
    team.meet();
    product(team, *m, room->packed, tiles, STORE, out);
  });
}
}
