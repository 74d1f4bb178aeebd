// Layer and RMS norm over a short last axis: x is (outer, members), and a row of few vectors, or of
// less than one.
//
// A unit is a tile of as many rows as a vector has lanes, so that a lane holds the statistics of a
// row. They are gathered down the tile's columns. All else is done along the tile as it lies in
// memory, as `members` whole vectors: lane l of vector k is element k * L + l, that is of row (k *
// L + l) / members, and there gamma, beta and their gradients have a table of the tile's size.
#include "kernel.h"

namespace normwise::NORMWISE_ISA {
namespace short_rows {

// Longer rows are sooner done one by one: in float32 with AVX-512, forward and backward together, a
// tile takes 0.2 of rows.cc's time at 10 members, the same at 32 and twice as much at 64.
constexpr int64_t kLongest = 32;

// What follows from the number of members alone.
template <class A>
struct Tile {
  static constexpr int L = kLanes<A>;

  int64_t rows, members;
  std::vector<A> gamma, beta;
  std::vector<IntOf<A>> row;  // of each element of a tile

  template <class T>
  explicit Tile(const Tensors<T>& tensors)
      : rows(tensors.norm.outer),
        members(tensors.norm.members),
        gamma(size_t(members * L)),
        beta(gamma.size()),
        row(gamma.size()) {
    for (int64_t i = 0; i < members * L; ++i) {
      gamma[size_t(i)] = tensors.gamma_at(i % members);
      beta[size_t(i)] = tensors.beta_at(i % members);
      row[size_t(i)] = IntOf<A>(i / members);
    }
  }

  Split split() const {
    const int64_t units = (rows + L - 1) / L, unit_elements = members * L;
    // The sums for gamma and beta are of the tile's size, and so few beside 32 tiles.
    const int64_t least = std::max<int64_t>(32, kElementsPerThread / unit_elements);
    return {units, 1, unit_elements, std::max((units + 63) / 64, least)};
  }

  int64_t rows_of(int64_t unit) const { return std::min<int64_t>(L, rows - unit * L); }

  // Calls f(offset in the tile, lanes...) for its vectors; only a last one may have a count of
  // lanes.
  template <class F>
  void for_vectors(int64_t unit, const F& f) const {
    const int64_t elements = rows_of(unit) * members;
    int64_t i = 0;
    for (; i + L <= elements; i += L) f(i);
    if (i < elements) f(i, int(elements - i));
  }

  // The values of the rows, one to a lane, spread over a vector of the tile.
  Vec<A> spread(Vec<A> of_rows, int64_t i) const { return pick(of_rows, load(row.data() + i)); }

  // The sums of the rows of a tile, one to a lane.
  Vec<A> row_sums(const A* tile) const {
    Vec<A> sums[4] = {};
    int64_t j = 0;
    for (; j + 4 <= members; j += 4) {
      for (int v = 0; v < 4; ++v) sums[v] += gather(tile + j + v, int(members));
    }
    for (; j < members; ++j) sums[0] += gather(tile + j, int(members));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

template <class T, Kind kind>
struct Forward {
  using A = ArithmeticOf<T>;
  static constexpr int64_t kUnitsAtOnce = 1;
  static constexpr int L = kLanes<A>;

  Tensors<T> tensors;
  Tile<A> tile;
  Split split;

  explicit Forward(const Call& call) : tensors(call), tile(tensors), split(tile.split()) {}

  struct Scratch {
    std::vector<A> x, columns;   // the tile, and the columns of it
    Vec<A> mean, inv_std, rest;  // xhat = (x - mean) * inv_std - rest, row by row

    explicit Scratch(const Forward& job) : x(size_t(job.split.unit_elements)), columns(x.size()) {}
  };

  void prepare(int64_t, Scratch&) const {}

  void gather(int64_t unit, int64_t, int64_t, Scratch& scratch) const {
    const T* x = tensors.x + unit * split.unit_elements;
    A* copy = scratch.x.data();
    tile.for_vectors(unit,
                     [&](int64_t i, auto... lanes) { store(copy + i, load(x + i, lanes...)); });

    const int64_t members = tile.members;
    const A size = A(members);
    A* columns = scratch.columns.data();
    Vec<A> mean = {}, rest = {}, squares[4] = {};
    if (tensors.norm.centred) {
      // The first element is subtracted: equal elements have exactly their own mean.
      const Vec<A> first = NORMWISE_ISA::gather(copy, int(members));
      Vec<A> sums[4] = {}, rests[4] = {};
      for (int64_t j = 0; j < members; ++j) {
        const Vec<A> v = NORMWISE_ISA::gather(copy + j, int(members));
        store(columns + j * L, v);
        sums[j % 4] += v - first;
      }
      mean = first + ((sums[0] + sums[1]) + (sums[2] + sums[3])) / size;
      for (int64_t j = 0; j < members; ++j) {
        const Vec<A> d = load(columns + j * L) - mean;
        rests[j % 4] += d;
        squares[j % 4] += d * d;
      }
      rest = ((rests[0] + rests[1]) + (rests[2] + rests[3])) / size;
    } else {
      for (int64_t j = 0; j < members; ++j) {
        const Vec<A> v = NORMWISE_ISA::gather(copy + j, int(members));
        squares[j % 4] += v * v;
      }
    }
    const Vec<A> total = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    const Vec<A> radicand = total / size - rest * rest + A(tensors.norm.epsilon);
    scratch.mean = mean;
    scratch.inv_std = radicand == A(0) ? Vec<A>{} : A(1) / square_root<A>(radicand);
    scratch.rest = rest * scratch.inv_std;
  }

  void settle(int64_t unit, int64_t, Scratch& scratch) const {
    A* statistics = tensors.statistics + unit * 2 * L;
    for (int64_t row = 0; row < tile.rows_of(unit); ++row) {
      statistics[2 * row] = scratch.mean[row];
      statistics[2 * row + 1] = scratch.inv_std[row];
    }
  }

  void apply(int64_t unit, int64_t, const Scratch& scratch) const {
    T* y = tensors.y + unit * split.unit_elements;
    tile.for_vectors(unit, [&](int64_t i, auto... lanes) {
      const Vec<A> deviation = load(scratch.x.data() + i) - tile.spread(scratch.mean, i);
      const Vec<A> xhat =
          deviation * tile.spread(scratch.inv_std, i) - tile.spread(scratch.rest, i);
      const Vec<A> z = xhat * load(tile.gamma.data() + i) + load(tile.beta.data() + i);
      store(y + i, activate<kind, A>(z, tensors.norm.activation, tensors.slope), lanes...);
    });
  }
};

template <class T, Kind kind>
struct Backward {
  using A = ArithmeticOf<T>;
  static constexpr int64_t kUnitsAtOnce = 1;
  static constexpr int L = kLanes<A>;

  Tensors<T> tensors;
  Tile<A> tile;
  Split split;
  Accumulators<A> accumulators;  // of a whole tile's size, and folded at the end

  explicit Backward(const Call& call)
      : tensors(call),
        tile(tensors),
        split(tile.split()),
        accumulators(split.chunks(), split.unit_elements,
                     call.dgamma != nullptr || call.dbeta != nullptr) {}

  struct Scratch {
    std::vector<A> xhat, g, gx;          // the tile's; g = gamma * dz, gx = g * xhat
    Vec<A> mean, inv_std, offset, pull;  // dx = g * inv_std - (offset + xhat * pull), row by row

    explicit Scratch(const Backward& job)
        : xhat(size_t(job.split.unit_elements)), g(xhat.size()), gx(xhat.size()) {}
  };

  void prepare(int64_t unit, Scratch& scratch) const {
    const A* statistics = tensors.statistics + unit * 2 * L;
    scratch.mean = scratch.inv_std = Vec<A>{};
    for (int64_t row = 0; row < tile.rows_of(unit); ++row) {
      scratch.mean[row] = statistics[2 * row];
      scratch.inv_std[row] = statistics[2 * row + 1];
    }
  }

  void gather(int64_t unit, int64_t, int64_t chunk, Scratch& scratch) const {
    const T* x = tensors.x + unit * split.unit_elements;
    const T* dy = tensors.dy + unit * split.unit_elements;
    const bool wanted = accumulators.wanted();
    A* dgamma = wanted ? accumulators.dgamma(chunk) : nullptr;
    A* dbeta = wanted ? accumulators.dbeta(chunk) : nullptr;
    tile.for_vectors(unit, [&](int64_t i, auto... lanes) {
      const Vec<A> gamma = load(tile.gamma.data() + i);
      const Vec<A> xhat =
          (load(x + i, lanes...) - tile.spread(scratch.mean, i)) * tile.spread(scratch.inv_std, i);
      Vec<A> dz = load(dy + i, lanes...);
      if constexpr (kind != Kind::kIdentity) {
        const Vec<A> z = xhat * gamma + load(tile.beta.data() + i);
        dz = deactivate<kind, A>(dz, z, tensors.norm.activation, tensors.slope);
      }
      const Vec<A> dzx = dz * xhat, g = dz * gamma;
      if (wanted) {
        store(dgamma + i, load(dgamma + i, lanes...) + dzx, lanes...);
        store(dbeta + i, load(dbeta + i, lanes...) + dz, lanes...);
      }
      store(scratch.xhat.data() + i, xhat);
      store(scratch.g.data() + i, g);
      store(scratch.gx.data() + i, g * xhat);
    });
  }

  void settle(int64_t, int64_t, Scratch& scratch) const {
    const A size = A(tile.members);
    const Vec<A> g = tile.row_sums(scratch.g.data()), gx = tile.row_sums(scratch.gx.data());
    scratch.offset = tensors.norm.centred ? scratch.inv_std * (g / size) : Vec<A>{};
    scratch.pull = scratch.inv_std * (gx / size);
  }

  void apply(int64_t unit, int64_t, const Scratch& scratch) const {
    T* dx = tensors.dx + unit * split.unit_elements;
    tile.for_vectors(unit, [&](int64_t i, auto... lanes) {
      const Vec<A> offset = tile.spread(scratch.offset, i), pull = tile.spread(scratch.pull, i);
      const Vec<A> pulled = offset + load(scratch.xhat.data() + i) * pull;
      const Vec<A> g = load(scratch.g.data() + i);
      store(dx + i, g * tile.spread(scratch.inv_std, i) - pulled, lanes...);
    });
  }

  // The sums of the tile's elements, row by row, are the gradients.
  void reduce(int threads) const {
    std::vector<double> dgamma(size_t(split.unit_elements)), dbeta(dgamma.size());
    accumulators.reduce(dgamma.data(), dbeta.data(), threads);
    const auto fold = [&](const std::vector<double>& sums, A* to) {
      for (int64_t member = 0; to != nullptr && member < tile.members; ++member) {
        double total = 0;
        for (int row = 0; row < L; ++row) total += sums[size_t(row * tile.members + member)];
        to[member] = A(total);
      }
    };
    fold(dgamma, tensors.dgamma);
    fold(dbeta, tensors.dbeta);
  }
};

}  // namespace short_rows

bool are_short_rows(const NormwiseNorm& norm) {
  return norm.groups == 1 && norm.before == 1 && norm.after == 1 &&
         norm.members <= short_rows::kLongest;
}

void run_short_rows(const Call& call, int threads) {
  run_family<short_rows::Forward, short_rows::Backward>(call, threads);
}

}  // namespace normwise::NORMWISE_ISA
