// Layer and RMS norm over axes in the middle, as (N, C, H, W) over C: x is (outer, members, after),
// and each of the (outer, after) columns is a set.
//
// A unit is a tile of neighbouring columns of one outer, narrow enough to stay in a core's cache
// from one pass to the next.
#include "window.h"

namespace normwise::NORMWISE_ISA {
namespace kept {

constexpr int64_t kTileBytes = 1 << 18;

template <class T>
struct Tiles {
  static constexpr int64_t kWindow = kWindowVectors * kLanes<ArithmeticOf<T>>;

  int64_t members, after, width, per_outer;

  explicit Tiles(const NormwiseNorm& norm) : members(norm.members), after(norm.after) {
    const int64_t fitting = kTileBytes / int64_t(sizeof(T)) / members;
    width = std::max<int64_t>(1, fitting / kWindow) * kWindow;
    width = std::min(width, after);
    per_outer = (after + width - 1) / width;
  }

  Split split(const NormwiseNorm& norm) const {
    const int64_t units = norm.outer * per_outer, unit_elements = members * width;
    const int64_t least = kElementsPerThread / unit_elements;
    return {units, 1, unit_elements, std::max({int64_t(1), (units + 63) / 64, least})};
  }
  int64_t outer(int64_t unit) const { return unit / per_outer; }
  int64_t first(int64_t unit) const { return unit % per_outer * width; }
  int64_t columns(int64_t unit) const { return std::min(width, after - first(unit)); }
  // Where the unit begins in x, and its means in the statistics.
  int64_t offset(int64_t unit) const { return outer(unit) * members * after + first(unit); }
  int64_t statistics(int64_t unit) const { return outer(unit) * 2 * after + first(unit); }
};

template <class T, Kind kind>
struct Forward {
  using A = ArithmeticOf<T>;
  static constexpr int64_t kUnitsAtOnce = 1;
  static constexpr int L = kLanes<A>;

  Tensors<T> tensors;
  Tiles<T> tiles;
  Split split;

  explicit Forward(const Call& call)
      : tensors(call), tiles(call.norm), split(tiles.split(call.norm)) {}

  struct Scratch {
    std::vector<double> means, squares;
    std::vector<A> mean, inv_std, rest;  // xhat = (x - mean) * inv_std + rest, per column

    explicit Scratch(const Forward& job)
        : means(size_t(job.tiles.width)),
          squares(means.size()),
          mean(size_t(job.tiles.width + L)),
          inv_std(mean.size()),
          rest(mean.size()) {}
  };

  void prepare(int64_t, Scratch&) const {}

  void gather(int64_t unit, int64_t, int64_t, Scratch& scratch) const {
    column_moments(tensors.x + tiles.offset(unit), tiles.after, tiles.members, tiles.columns(unit),
                   tensors.norm.centred != 0, scratch.means.data(), scratch.squares.data());
  }

  void settle(int64_t unit, int64_t, Scratch& scratch) const {
    A* statistics = tensors.statistics + tiles.statistics(unit);
    const double size = double(tiles.members);
    for (int64_t column = 0; column < tiles.columns(unit); ++column) {
      const size_t at = size_t(column);
      const double inv_std = inverse_root(scratch.squares[at] / size, tensors.norm.epsilon);
      scratch.mean[at] = A(scratch.means[at]);
      scratch.inv_std[at] = A(inv_std);
      scratch.rest[at] = A((double(scratch.mean[at]) - scratch.means[at]) * inv_std);
      statistics[column] = scratch.mean[at];
      statistics[tiles.after + column] = scratch.inv_std[at];
    }
  }

  void apply(int64_t unit, int64_t, const Scratch& scratch) const {
    const T* x = tensors.x + tiles.offset(unit);
    T* y = tensors.y + tiles.offset(unit);
    const int code = tensors.norm.activation;
    for (int64_t row = 0; row < tiles.members; ++row) {
      const A gamma = tensors.gamma_at(row), beta = tensors.beta_at(row);
      for_windows<A>(tiles.columns(unit), [&](int64_t column, auto vectors, int lanes) {
        constexpr int V = vectors;
        for (int v = 0; v < V; ++v) {
          const int64_t at = column + v * L;
          const Vec<A> deviation =
              load_lanes<V>(x + row * tiles.after + at, lanes) - load(scratch.mean.data() + at);
          const Vec<A> xhat =
              deviation * load(scratch.inv_std.data() + at) + load(scratch.rest.data() + at);
          store_lanes<V>(y + row * tiles.after + at,
                         activate<kind, A>(xhat * gamma + beta, code, tensors.slope), lanes);
        }
      });
    }
  }
};

template <class T, Kind kind>
struct Backward {
  using A = ArithmeticOf<T>;
  static constexpr int64_t kUnitsAtOnce = 1;
  static constexpr int L = kLanes<A>;

  Tensors<T> tensors;
  Tiles<T> tiles;
  Split split;
  Accumulators<double> accumulators;

  explicit Backward(const Call& call)
      : tensors(call),
        tiles(call.norm),
        split(tiles.split(call.norm)),
        accumulators(split.chunks(), tiles.members,
                     call.dgamma != nullptr || call.dbeta != nullptr) {}

  struct Scratch {
    std::vector<double> g, gx;                   // sums of g = gamma * dz and of g * xhat
    std::vector<A> mean, inv_std, offset, pull;  // dx = g * inv_std - (offset + xhat * pull)

    explicit Scratch(const Backward& job)
        : g(size_t(job.tiles.width)),
          gx(g.size()),
          mean(size_t(job.tiles.width + L)),
          inv_std(mean.size()),
          offset(mean.size()),
          pull(mean.size()) {}
  };

  void prepare(int64_t unit, Scratch& scratch) const {
    const A* statistics = tensors.statistics + tiles.statistics(unit);
    const int64_t columns = tiles.columns(unit);
    std::copy(statistics, statistics + columns, scratch.mean.begin());
    std::copy(statistics + tiles.after, statistics + tiles.after + columns,
              scratch.inv_std.begin());
    std::fill(scratch.g.begin(), scratch.g.end(), 0.0);
    std::fill(scratch.gx.begin(), scratch.gx.end(), 0.0);
  }

  // dz, the gradient with respect to what the activation was given.
  Vec<A> gradient(Vec<A> dy, Vec<A> xhat, A gamma, A beta) const {
    if constexpr (kind == Kind::kIdentity) return dy;
    return deactivate<kind, A>(dy, xhat * gamma + beta, tensors.norm.activation, tensors.slope);
  }

  void gather(int64_t unit, int64_t, int64_t chunk, Scratch& scratch) const {
    const T* x = tensors.x + tiles.offset(unit);
    const T* dy = tensors.dy + tiles.offset(unit);
    for (int64_t begin = 0; begin < tiles.members; begin += kBlockRows) {
      const int64_t end = std::min(tiles.members, begin + kBlockRows);
      for_windows<A>(tiles.columns(unit), [&](int64_t column, auto vectors, int lanes) {
        constexpr int V = vectors;
        Vec<A> g_sums[V] = {}, gx_sums[V] = {};
        for (int64_t row = begin; row < end; ++row) {
          const A gamma = tensors.gamma_at(row), beta = tensors.beta_at(row);
          Vec<A> row_dz = {}, row_dzx = {};
          for (int v = 0; v < V; ++v) {
            const int64_t at = column + v * L, element = row * tiles.after + at;
            const Vec<A> xhat =
                (load_lanes<V>(x + element, lanes) - load(scratch.mean.data() + at)) *
                load(scratch.inv_std.data() + at);
            const Vec<A> dz = gradient(load_lanes<V>(dy + element, lanes), xhat, gamma, beta);
            row_dz += dz;
            row_dzx += dz * xhat;
            g_sums[v] += dz * gamma;
            gx_sums[v] += dz * gamma * xhat;
          }
          if (accumulators.wanted()) {
            if (V == 1 && lanes < L) {  // beyond the tile the scratch has values of old
              row_dz = keep<A>(row_dz, lanes);
              row_dzx = keep<A>(row_dzx, lanes);
            }
            accumulators.dgamma(chunk)[row] += double(sum<A>(row_dzx));
            accumulators.dbeta(chunk)[row] += double(sum<A>(row_dz));
          }
        }
        A sums[2][V * L];
        for (int v = 0; v < V; ++v) store(sums[0] + v * L, g_sums[v]);
        for (int v = 0; v < V; ++v) store(sums[1] + v * L, gx_sums[v]);
        const int used = (V - 1) * L + lanes;
        for (int i = 0; i < used; ++i) scratch.g[size_t(column + i)] += double(sums[0][i]);
        for (int i = 0; i < used; ++i) scratch.gx[size_t(column + i)] += double(sums[1][i]);
      });
    }
  }

  void settle(int64_t unit, int64_t, Scratch& scratch) const {
    const double size = double(tiles.members);
    for (int64_t column = 0; column < tiles.columns(unit); ++column) {
      const size_t at = size_t(column);
      const double inv_std = double(scratch.inv_std[at]);
      scratch.offset[at] = tensors.norm.centred ? A(inv_std * scratch.g[at] / size) : A(0);
      scratch.pull[at] = A(inv_std * scratch.gx[at] / size);
    }
  }

  void apply(int64_t unit, int64_t, const Scratch& scratch) const {
    const T* x = tensors.x + tiles.offset(unit);
    const T* dy = tensors.dy + tiles.offset(unit);
    T* dx = tensors.dx + tiles.offset(unit);
    for (int64_t row = 0; row < tiles.members; ++row) {
      const A gamma = tensors.gamma_at(row), beta = tensors.beta_at(row);
      for_windows<A>(tiles.columns(unit), [&](int64_t column, auto vectors, int lanes) {
        constexpr int V = vectors;
        for (int v = 0; v < V; ++v) {
          const int64_t at = column + v * L, element = row * tiles.after + at;
          const Vec<A> inv_std = load(scratch.inv_std.data() + at);
          const Vec<A> xhat =
              (load_lanes<V>(x + element, lanes) - load(scratch.mean.data() + at)) * inv_std;
          const Vec<A> dz = gradient(load_lanes<V>(dy + element, lanes), xhat, gamma, beta);
          const Vec<A> offset = load(scratch.offset.data() + at);
          const Vec<A> pull = load(scratch.pull.data() + at);
          store_lanes<V>(dx + element, dz * (inv_std * gamma) - (offset + xhat * pull), lanes);
        }
      });
    }
  }

  void reduce(int threads) const { accumulators.reduce(tensors.dgamma, tensors.dbeta, threads); }
};

}  // namespace kept

void run_kept(const Call& call, int threads) {
  run_family<kept::Forward, kept::Backward>(call, threads);
}

}  // namespace normwise::NORMWISE_ISA
