// Layer and RMS norm over axes in the middle, as (N, C, H, W) over C: x is (outer, members, after),
// and each of the (outer, after) columns is a set.
//
// A unit is a tile: some neighbouring columns of one outer over all rows, and a row is a member. It
// is narrow enough to stay in a core's cache from one pass to the next, and one piece.
#include "strips.h"

namespace normwise::NORMWISE_ISA {
namespace kept {

constexpr int64_t kTileBytes = 1 << 18;

template <class T>
struct Tiles {
  int64_t members, after;
  int64_t width;      // columns of a tile; the last of an outer may have fewer
  int64_t per_outer;  // tiles

  explicit Tiles(const Norm& norm) : members(norm.members), after(norm.after) {
    constexpr int64_t kStep = 4 * kPack<T>;
    const int64_t fitting = kTileBytes / int64_t(sizeof(T)) / members;
    width = std::min(std::clamp(fitting / kStep * kStep, kStep, kWindow), after);
    per_outer = (after + width - 1) / width;
  }

  Split split(const Norm& norm) const {
    const int64_t units = norm.outer / norm.samples * per_outer, unit_elements = members * width;
    const int64_t fewest = kElementsPerThread / unit_elements;
    return {norm.samples, units, 1, unit_elements,
            std::max({int64_t(1), (units + 63) / 64, fewest})};
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

  Tensors<T> tensors;
  Tiles<T> tiles;
  Split split;

  explicit Forward(const Call& call)
      : tensors(call), tiles(call.norm), split(tiles.split(call.norm)) {}

  // Of every column, in pack order.
  struct Scratch {
    std::vector<A> centre, sum, square;  // of a block: see add_moments
    std::vector<double> means, squares;  // the moments of the blocks so far
    std::vector<A> mean, inv_std, rest;  // xhat = (x - mean) * inv_std + rest

    explicit Scratch(const Forward& job)
        : centre(size_t(padded<T>(job.tiles.width))),
          sum(centre.size()),
          square(centre.size()),
          means(centre.size()),
          squares(centre.size()),
          mean(centre.size()),
          inv_std(centre.size()),
          rest(centre.size()) {}
  };

  void prepare(int64_t, Scratch& scratch) const {
    std::fill(scratch.centre.begin(), scratch.centre.end(), A(0));
  }

  // Block by block, each read once. What is summed up are the deviations from the mean of the
  // blocks before, and in the first from that of a few rows.
  void gather(int64_t unit, int64_t, int64_t, Scratch& scratch) const {
    const T* x = tensors.x + tiles.offset(unit);
    const int64_t columns = tiles.columns(unit);
    for (int64_t row = 0; row < tiles.members; ++row) {
      const int64_t begin = tiles.offset(unit) + row * tiles.after;
      tensors.add(begin, begin + columns);
    }
    const auto sum_up = [&](int64_t row, int64_t rows) {
      for (auto* sums : {&scratch.sum, &scratch.square}) {
        std::fill(sums->begin(), sums->end(), A(0));
      }
      add_moments(x + row * tiles.after, tiles.after, rows, columns, scratch.centre.data(),
                  scratch.sum.data(), scratch.square.data());
    };
    for (int64_t row = 0; row < tiles.members; row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, tiles.members - row);
      if (tensors.norm.subtract_mean && row == 0) {
        // The centre is the mean of the first few rows, whose deviations are summed up from the
        // first one.
        for_packs<T>(0, columns, [&](int64_t column, auto... lanes) {
          write<T>(scratch.centre.data() + column, load(x + column, lanes...));
        });
        const int64_t few = std::min(rows, enough_for_centre(rows));
        sum_up(0, few);
        for (size_t i = 0; i < scratch.centre.size(); ++i) {
          scratch.centre[i] += scratch.sum[i] / A(few);
        }
      } else if (tensors.norm.subtract_mean) {
        std::copy(scratch.means.begin(), scratch.means.end(), scratch.centre.begin());
      }
      sum_up(row, rows);
      add_block(int64_t(scratch.means.size()), double(row), double(rows),
                tensors.norm.subtract_mean, scratch.centre.data(), scratch.sum.data(),
                scratch.square.data(), scratch.means.data(), scratch.squares.data());
    }
  }

  void settle(int64_t unit, int64_t, Scratch& scratch) const {
    const double size = double(tiles.members);
    for (size_t i = 0; i < scratch.mean.size(); ++i) {
      const double inv_std = inverse_root(scratch.squares[i] / size, tensors.norm.epsilon);
      scratch.mean[i] = A(scratch.means[i]);
      scratch.inv_std[i] = A(inv_std);
      scratch.rest[i] = A((double(scratch.mean[i]) - scratch.means[i]) * inv_std);
    }
    A* statistics = tensors.statistics + tiles.statistics(unit);
    for (const auto* line : {&scratch.mean, &scratch.inv_std}) {
      scratch.sum = *line;
      to_natural_order<T>(scratch.sum.data(), int64_t(scratch.sum.size()));
      std::copy_n(scratch.sum.begin(), tiles.columns(unit), statistics);
      statistics += tiles.after;
    }
  }

  void apply(int64_t unit, int64_t, const Scratch& scratch) const {
    const T* x = tensors.x + tiles.offset(unit);
    T* y = tensors.y + tiles.offset(unit);
    const int64_t parameter = tensors.norm.parameter(tiles.outer(unit));
    for_strips<kWrittenRows>(tiles.members, [&](int64_t row, int64_t step, auto count) {
      constexpr int K = count;
      A gamma[K], beta[K];
      for (int k = 0; k < K; ++k) {
        gamma[k] = tensors.gamma_at(parameter + row + k * step);
        beta[k] = tensors.beta_at(parameter + row + k * step);
      }
      for_packs<T>(0, tiles.columns(unit), [&](int64_t column, auto... lanes) {
        const Pack<T> mean = read<T>(scratch.mean.data() + column);
        const Pack<T> inv_std = read<T>(scratch.inv_std.data() + column);
        const Pack<T> rest = read<T>(scratch.rest.data() + column);
        // All are loaded before one is stored: see columns.cc.
        Pack<T> v[K];
        for (int k = 0; k < K; ++k) {
          v[k] = load(x + (row + k * step) * tiles.after + column, lanes...);
        }
        for (int k = 0; k < K; ++k) {
          const Pack<T> z = ((v[k] - mean) * inv_std + rest) * gamma[k] + beta[k];
          store(y + (row + k * step) * tiles.after + column,
                activate<kind>(z, tensors.norm.activation, tensors.slope), lanes...);
        }
      });
    });
  }
};

template <class T, Kind kind>
struct Backward {
  using A = ArithmeticOf<T>;

  Tensors<T> tensors;
  Tiles<T> tiles;
  Split split;
  Accumulators<double> accumulators;

  explicit Backward(const Call& call)
      : tensors(call),
        tiles(call.norm),
        split(tiles.split(call.norm)),
        accumulators(split, tiles.members, call) {}

  // Of every column, in pack order.
  struct Scratch {
    std::vector<A> mean, inv_std;
    std::vector<A> g, gx;                   // the sums of g = gamma * dz and of g * xhat in a block
    std::vector<double> g_total, gx_total;  // and in all of them
    std::vector<A> offset, pull;            // dx = g * inv_std - (offset + (x - mean) * pull)

    explicit Scratch(const Backward& job)
        : mean(size_t(padded<T>(job.tiles.width))),
          inv_std(mean.size()),
          g(mean.size()),
          gx(mean.size()),
          g_total(mean.size()),
          gx_total(mean.size()),
          offset(mean.size()),
          pull(mean.size()) {}
  };

  void prepare(int64_t unit, Scratch& scratch) const {
    const A* statistics = tensors.statistics + tiles.statistics(unit);
    for (auto* line : {&scratch.mean, &scratch.inv_std}) {
      std::copy_n(statistics, tiles.columns(unit), line->begin());
      to_pack_order<T>(line->data(), int64_t(line->size()));
      statistics += tiles.after;
    }
    for (auto* sums : {&scratch.g_total, &scratch.gx_total})
      std::fill(sums->begin(), sums->end(), 0.0);
  }

  // dz, the gradient with respect to what the activation was given.
  Pack<T> gradient(Pack<T> dy, Pack<T> xhat, A gamma, A beta) const {
    if constexpr (kind == Kind::kIdentity) return dy;
    return deactivate<kind>(dy, xhat * gamma + beta, tensors.norm.activation, tensors.slope);
  }

  void gather(int64_t unit, int64_t, int64_t chunk, Scratch& scratch) const {
    for (int64_t row = 0; row < tiles.members; row += kBlockRows) {
      for (auto* sums : {&scratch.g, &scratch.gx}) std::fill(sums->begin(), sums->end(), A(0));
      const int64_t rows = std::min(kBlockRows, tiles.members - row);
      for_strips<kReadRows / 2>(rows, [&](int64_t first, int64_t step, auto count) {
        gather_strip<count>(unit, chunk, row + first, step, scratch);
      });
      for (size_t i = 0; i < scratch.g.size(); ++i) {
        scratch.g_total[i] += double(scratch.g[i]);
        scratch.gx_total[i] += double(scratch.gx[i]);
      }
    }
  }

  template <int K>
  void gather_strip(int64_t unit, int64_t chunk, int64_t row, int64_t step,
                    Scratch& scratch) const {
    const T* x = tensors.x + tiles.offset(unit);
    const T* dy = tensors.dy + tiles.offset(unit);
    const int64_t parameter = tensors.norm.parameter(tiles.outer(unit));
    A gamma[K], beta[K];
    for (int k = 0; k < K; ++k) {
      gamma[k] = tensors.gamma_at(parameter + row + k * step);
      beta[k] = tensors.beta_at(parameter + row + k * step);
    }
    Pack<T> row_dz[K] = {}, row_dzx[K] = {};
    for_packs<T>(0, tiles.columns(unit), [&](int64_t column, auto... lanes) {
      const Pack<T> mean = read<T>(scratch.mean.data() + column);
      const Pack<T> inv_std = read<T>(scratch.inv_std.data() + column);
      Pack<T> g_sum = read<T>(scratch.g.data() + column);
      Pack<T> gx_sum = read<T>(scratch.gx.data() + column);
      for (int k = 0; k < K; ++k) {
        const int64_t at = (row + k * step) * tiles.after + column;
        const Pack<T> xhat = (load(x + at, lanes...) - mean) * inv_std;
        const Pack<T> dz = gradient(load(dy + at, lanes...), xhat, gamma[k], beta[k]);
        const Pack<T> dzx = dz * xhat;
        g_sum += dz * gamma[k];
        gx_sum += dzx * gamma[k];
        row_dz[k] += keep(dz, lanes...);
        row_dzx[k] += keep(dzx, lanes...);
      }
      write<T>(scratch.g.data() + column, g_sum);
      write<T>(scratch.gx.data() + column, gx_sum);
    });
    if (!accumulators.wanted()) return;
    for (int k = 0; k < K; ++k) {
      accumulators.dgamma(chunk)[row + k * step] += double(sum<A>(together(row_dzx[k])));
      accumulators.dbeta(chunk)[row + k * step] += double(sum<A>(together(row_dz[k])));
    }
  }

  void settle(int64_t, int64_t, Scratch& scratch) const {
    const double size = double(tiles.members);
    for (size_t i = 0; i < scratch.mean.size(); ++i) {
      const double inv_std = double(scratch.inv_std[i]);
      scratch.offset[i] =
          tensors.norm.subtract_mean ? A(inv_std * scratch.g_total[i] / size) : A(0);
      scratch.pull[i] = A(inv_std * inv_std * scratch.gx_total[i] / size);
    }
  }

  void apply(int64_t unit, int64_t, const Scratch& scratch) const {
    const T* x = tensors.x + tiles.offset(unit);
    const T* dy = tensors.dy + tiles.offset(unit);
    const Gradient<T> dx = tensors.dx;
    const int64_t parameter = tensors.norm.parameter(tiles.outer(unit));
    for_strips<kWrittenRows>(tiles.members, [&](int64_t row, int64_t step, auto count) {
      constexpr int K = count;
      A gamma[K], beta[K];
      for (int k = 0; k < K; ++k) {
        gamma[k] = tensors.gamma_at(parameter + row + k * step);
        beta[k] = tensors.beta_at(parameter + row + k * step);
      }
      for_packs<T>(0, tiles.columns(unit), [&](int64_t column, auto... lanes) {
        const Pack<T> mean = read<T>(scratch.mean.data() + column);
        const Pack<T> inv_std = read<T>(scratch.inv_std.data() + column);
        const Pack<T> offset = read<T>(scratch.offset.data() + column);
        const Pack<T> pull = read<T>(scratch.pull.data() + column);
        Pack<T> deviation[K], dz[K];
        for (int k = 0; k < K; ++k) {
          const int64_t at = (row + k * step) * tiles.after + column;
          deviation[k] = load(x + at, lanes...) - mean;
          dz[k] = gradient(load(dy + at, lanes...), deviation[k] * inv_std, gamma[k], beta[k]);
        }
        for (int k = 0; k < K; ++k) {
          dx.put(tiles.offset(unit) + (row + k * step) * tiles.after + column,
                 dz[k] * (inv_std * gamma[k]) - (offset + deviation[k] * pull), lanes...);
        }
      });
    });
  }

  void reduce(int threads) const { accumulators.reduce(tensors.dgamma, tensors.dbeta, threads); }
};

}  // namespace kept

void run_kept(const Call& call, int threads) {
  run_family<kept::Forward, kept::Backward>(call, threads);
}

}  // namespace normwise::NORMWISE_ISA
