// Group and instance norm, channels last: x is (outer, before, channels), and a row of memory holds
// an element of every set.
//
// A unit is one outer. Where the channels do not fill vectors, `rows_per_line` rows of x are read
// as one line: the least number of them that fills whole vectors, and column i of it is channel i %
// channels. What is left of x after the last whole line is its tail.
#include <numeric>

#include "window.h"

namespace normwise::NORMWISE_ISA {
namespace columns {

// How much of a unit is a piece: enough that merging it costs nothing, few enough for a core's
// cache.
constexpr int64_t kPieceBytes = 1 << 18;

template <class T>
struct Lines {
  int64_t channels, columns, lines, tail, lines_per_piece;

  explicit Lines(const NormwiseNorm& norm) : channels(norm.groups * norm.members) {
    constexpr int64_t L = kLanes<ArithmeticOf<T>>;
    // With many channels the part of a vector that each row ends with costs little.
    const int64_t rows_per_line = channels >= 8 * L ? 1 : L / std::gcd(channels, L);
    columns = rows_per_line * channels;
    lines = norm.before / rows_per_line;
    tail = norm.before % rows_per_line * channels;
    lines_per_piece = std::max<int64_t>(kBlockRows, kPieceBytes / (columns * int64_t(sizeof(T))));
  }

  int64_t pieces() const {
    return std::max<int64_t>(1, (lines + lines_per_piece - 1) / lines_per_piece);
  }
  int64_t begin(int64_t piece) const { return piece * lines_per_piece; }
  int64_t count(int64_t piece) const { return std::min(lines_per_piece, lines - begin(piece)); }
  bool has_tail(int64_t piece) const { return tail > 0 && piece == pieces() - 1; }

  // Calls f(start, columns) for the lines of a piece, the tail last.
  template <class F>
  void for_lines(int64_t piece, const F& f) const {
    const int64_t end = begin(piece) + count(piece);
    for (int64_t line = begin(piece); line < end; ++line) f(line * columns, columns);
    if (has_tail(piece)) f(lines * columns, tail);
  }
};

Split split_columns(const NormwiseNorm& norm, int64_t pieces) {
  const int64_t unit_elements = norm.before * norm.groups * norm.members;
  const int64_t least = std::max<int64_t>(1, kElementsPerThread / unit_elements);
  return {norm.outer, pieces, unit_elements, std::max((norm.outer + 63) / 64, least)};
}

// Calls f(group, channel, column) for every column of a line, group by group.
template <class F>
inline void for_columns(const NormwiseNorm& norm, int64_t columns, const F& f) {
  const int64_t channels = norm.groups * norm.members;
  for (int64_t group = 0; group < norm.groups; ++group) {
    for (int64_t channel = group * norm.members; channel < (group + 1) * norm.members; ++channel) {
      for (int64_t column = channel; column < columns; column += channels)
        f(group, channel, column);
    }
  }
}

template <class T, Kind kind>
struct Forward {
  using A = ArithmeticOf<T>;
  static constexpr int64_t kUnitsAtOnce = 1;
  static constexpr int L = kLanes<A>;

  Tensors<T> tensors;
  Lines<T> shape;
  Split split;

  explicit Forward(const Call& call)
      : tensors(call), shape(call.norm), split(split_columns(call.norm, shape.pieces())) {}

  struct Scratch {
    std::vector<double> means, squares;  // of every column of a piece, piece by piece
    std::vector<A> tail;
    std::vector<A> mean, scale, shift;  // y = (x - mean) * scale + shift, per column

    explicit Scratch(const Forward& job)
        : means(size_t(job.split.pieces * job.shape.columns)),
          squares(means.size()),
          tail(size_t(job.shape.tail + L)),
          mean(size_t(job.shape.columns + L)),
          scale(mean.size()),
          shift(mean.size()) {}
  };

  void prepare(int64_t, Scratch&) const {}

  void gather(int64_t unit, int64_t piece, int64_t, Scratch& scratch) const {
    column_moments(tensors.x + unit * split.unit_elements + shape.begin(piece) * shape.columns,
                   shape.columns, shape.count(piece), shape.columns, tensors.norm.centred != 0,
                   scratch.means.data() + piece * shape.columns,
                   scratch.squares.data() + piece * shape.columns);
  }

  void settle(int64_t unit, int64_t, Scratch& scratch) const {
    const NormwiseNorm& norm = tensors.norm;
    const T* tail = tensors.x + unit * split.unit_elements + shape.lines * shape.columns;
    A* statistics = tensors.statistics + unit * 2 * norm.groups;
    for (int64_t i = 0; i < shape.tail; i += L) {
      const int lanes = int(std::min<int64_t>(L, shape.tail - i));
      store(scratch.tail.data() + i, load(tail + i, lanes));
    }

    // All parts of a set are few, so their means are averaged at once: the first is subtracted, and
    // equal means thus give exactly that mean.
    for (int64_t group = 0; group < norm.groups; ++group) {
      const auto for_parts = [&](const auto& f) {
        for (int64_t channel = group * norm.members; channel < (group + 1) * norm.members;
             ++channel) {
          for (int64_t column = channel; column < shape.columns; column += shape.channels) {
            for (int64_t piece = 0; piece < split.pieces; ++piece) {
              const int64_t at = piece * shape.columns + column;
              const double count = double(shape.count(piece));
              if (count > 0) f(count, scratch.means[size_t(at)], scratch.squares[size_t(at)]);
            }
            if (column < shape.tail) {
              const double value = double(scratch.tail[size_t(column)]);
              norm.centred ? f(1.0, value, 0.0) : f(1.0, 0.0, value * value);
            }
          }
        }
      };
      double count = 0, first = 0, sum = 0, squares = 0;
      for_parts([&](double part, double mean, double part_squares) {
        if (count == 0) first = mean;
        count += part;
        sum += part * (mean - first);
        squares += part_squares;
      });
      const double mean = first + sum / count;
      for_parts([&](double part, double part_mean, double) {
        squares += part * ((part_mean - mean) * (part_mean - mean));
      });
      const double inv_std = inverse_root(squares / count, norm.epsilon);
      const A rounded = A(mean);
      statistics[group] = rounded;
      statistics[norm.groups + group] = A(inv_std);
      for (int64_t channel = group * norm.members; channel < (group + 1) * norm.members;
           ++channel) {
        const size_t at = size_t(channel);
        scratch.mean[at] = rounded;
        scratch.scale[at] = A(inv_std) * tensors.gamma_at(channel);
        scratch.shift[at] =
            tensors.beta_at(channel) + A(double(rounded) - mean) * scratch.scale[at];
      }
    }
    for (auto* row : {&scratch.mean, &scratch.scale, &scratch.shift}) {
      for (int64_t at = shape.channels; at < shape.columns; ++at) {
        (*row)[size_t(at)] = (*row)[size_t(at - shape.channels)];
      }
    }
  }

  void apply(int64_t unit, int64_t piece, const Scratch& scratch) const {
    const T* x = tensors.x + unit * split.unit_elements;
    T* y = tensors.y + unit * split.unit_elements;
    const int code = tensors.norm.activation;
    const A *mean = scratch.mean.data(), *scale = scratch.scale.data(),
            *shift = scratch.shift.data();
    shape.for_lines(piece, [&](int64_t offset, int64_t columns) {
      const auto calculate = [&](Vec<A> v, int64_t column) {
        const Vec<A> z = (v - load(mean + column)) * load(scale + column) + load(shift + column);
        return activate<kind, A>(z, code, tensors.slope);
      };
      int64_t column = 0;
      for (; column + L <= columns; column += L) {
        store(y + offset + column, calculate(load(x + offset + column), column));
      }
      if (column < columns) {
        const int lanes = int(columns - column);
        store(y + offset + column, calculate(load(x + offset + column, lanes), column), lanes);
      }
    });
  }
};

template <class T, Kind kind>
struct Backward {
  using A = ArithmeticOf<T>;
  static constexpr int64_t kUnitsAtOnce = 1;
  static constexpr int L = kLanes<A>;

  Tensors<T> tensors;
  Lines<T> shape;
  Split split;
  Accumulators<double> accumulators;

  explicit Backward(const Call& call)
      : tensors(call),
        shape(call.norm),
        split(split_columns(call.norm, shape.pieces())),
        accumulators(split.chunks(), shape.channels,
                     call.dgamma != nullptr || call.dbeta != nullptr) {}

  struct Scratch {
    // Per piece the sums of dz and of dz * (x - mean), column by column.
    std::vector<double> dz, dzx;
    // Per column xhat = (x - mean) * inv_std, z = xhat * gamma + beta, and
    // dx = dz * factor - (offset + xhat * pull).
    std::vector<A> mean, inv_std, gamma, beta, factor, offset, pull;

    explicit Scratch(const Backward& job)
        : dz(size_t(job.split.pieces * job.shape.columns)),
          dzx(dz.size()),
          mean(size_t(job.shape.columns + L)),
          inv_std(mean.size()),
          gamma(mean.size()),
          beta(mean.size()),
          factor(mean.size()),
          offset(mean.size()),
          pull(mean.size()) {}
  };

  // What the statistics and parameters say of each column, before any sum is known.
  void prepare(int64_t unit, Scratch& scratch) const {
    const A* statistics = tensors.statistics + unit * 2 * tensors.norm.groups;
    for_columns(tensors.norm, shape.columns, [&](int64_t group, int64_t channel, int64_t column) {
      const size_t at = size_t(column);
      scratch.mean[at] = statistics[group];
      scratch.inv_std[at] = statistics[tensors.norm.groups + group];
      scratch.gamma[at] = tensors.gamma_at(channel);
      scratch.beta[at] = tensors.beta_at(channel);
    });
    std::fill(scratch.dz.begin(), scratch.dz.end(), 0.0);
    std::fill(scratch.dzx.begin(), scratch.dzx.end(), 0.0);
  }

  // The gradient with respect to what the activation was given; x is already without its mean.
  Vec<A> gradient(Vec<A> dy, Vec<A> deviation, int64_t column, const Scratch& scratch) const {
    if constexpr (kind == Kind::kIdentity) return dy;
    const Vec<A> xhat = deviation * load(scratch.inv_std.data() + column);
    const Vec<A> z =
        xhat * load(scratch.gamma.data() + column) + load(scratch.beta.data() + column);
    return deactivate<kind, A>(dy, z, tensors.norm.activation, tensors.slope);
  }

  // Adds the sums over some rows of a unit, `offset` elements from its start.
  void add(int64_t unit, int64_t offset, int64_t rows, int64_t columns, int64_t piece,
           Scratch& scratch) const {
    const T* x = tensors.x + unit * split.unit_elements + offset;
    const T* dy = tensors.dy + unit * split.unit_elements + offset;
    double* dz_sums = scratch.dz.data() + piece * shape.columns;
    double* dzx_sums = scratch.dzx.data() + piece * shape.columns;
    for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
      const int64_t end = std::min(rows, begin + kBlockRows);
      for_windows<A>(columns, [&](int64_t column, auto vectors, int lanes) {
        constexpr int V = vectors;
        Vec<A> mean[V], dz[V] = {}, dzx[V] = {};
        for (int v = 0; v < V; ++v) mean[v] = load(scratch.mean.data() + column + v * L);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t at = row * shape.columns + column;
          for (int v = 0; v < V; ++v) {
            const Vec<A> deviation = load_lanes<V>(x + at + v * L, lanes) - mean[v];
            const Vec<A> g =
                gradient(load_lanes<V>(dy + at + v * L, lanes), deviation, column + v * L, scratch);
            dz[v] += g;
            dzx[v] += g * deviation;
          }
        }
        A sums[2][V * L];
        for (int v = 0; v < V; ++v) store(sums[0] + v * L, dz[v]);
        for (int v = 0; v < V; ++v) store(sums[1] + v * L, dzx[v]);
        const int used = (V - 1) * L + lanes;
        for (int i = 0; i < used; ++i) dz_sums[column + i] += double(sums[0][i]);
        for (int i = 0; i < used; ++i) dzx_sums[column + i] += double(sums[1][i]);
      });
    }
  }

  void gather(int64_t unit, int64_t piece, int64_t, Scratch& scratch) const {
    add(unit, shape.begin(piece) * shape.columns, shape.count(piece), shape.columns, piece,
        scratch);
    if (shape.has_tail(piece))
      add(unit, shape.lines * shape.columns, 1, shape.tail, piece, scratch);
  }

  void settle(int64_t, int64_t chunk, Scratch& scratch) const {
    const NormwiseNorm& norm = tensors.norm;
    const double size = double(norm.before * norm.members);
    for (int64_t group = 0; group < norm.groups; ++group) {
      const double inv_std = double(scratch.inv_std[size_t(group * norm.members)]);
      double g_sum = 0, gx_sum = 0;  // of g = gamma * dz, and of g * xhat
      const int64_t begin = group * norm.members, end = begin + norm.members;
      for (int64_t channel = begin; channel < end; ++channel) {
        double dz = 0, dzx = 0;
        for (int64_t piece = 0; piece < split.pieces; ++piece) {
          for (int64_t column = channel; column < shape.columns; column += shape.channels) {
            dz += scratch.dz[size_t(piece * shape.columns + column)];
            dzx += scratch.dzx[size_t(piece * shape.columns + column)];
          }
        }
        dzx *= inv_std;
        if (accumulators.wanted()) {
          accumulators.dgamma(chunk)[channel] += dzx;
          accumulators.dbeta(chunk)[channel] += dz;
        }
        const double gamma = double(tensors.gamma_at(channel));
        g_sum += gamma * dz;
        gx_sum += gamma * dzx;
      }
      const double offset = norm.centred ? inv_std * g_sum / size : 0;
      for (int64_t channel = begin; channel < end; ++channel) {
        for (int64_t column = channel; column < shape.columns; column += shape.channels) {
          const size_t at = size_t(column);
          scratch.factor[at] = A(inv_std) * scratch.gamma[at];
          scratch.offset[at] = A(offset);
          scratch.pull[at] = A(inv_std * gx_sum / size);
        }
      }
    }
  }

  void apply(int64_t unit, int64_t piece, const Scratch& scratch) const {
    const T* x = tensors.x + unit * split.unit_elements;
    const T* dy = tensors.dy + unit * split.unit_elements;
    T* dx = tensors.dx + unit * split.unit_elements;
    const A *mean = scratch.mean.data(), *inv_std = scratch.inv_std.data();
    const A *factor = scratch.factor.data(), *offset = scratch.offset.data();
    const A* pull = scratch.pull.data();
    shape.for_lines(piece, [&](int64_t start, int64_t columns) {
      const auto calculate = [&](Vec<A> x_lanes, Vec<A> dy_lanes, int64_t column) {
        const Vec<A> deviation = x_lanes - load(mean + column);
        const Vec<A> dz = gradient(dy_lanes, deviation, column, scratch);
        const Vec<A> xhat = deviation * load(inv_std + column);
        return dz * load(factor + column) - (load(offset + column) + xhat * load(pull + column));
      };
      int64_t column = 0;
      for (; column + L <= columns; column += L) {
        const int64_t at = start + column;
        store(dx + at, calculate(load(x + at), load(dy + at), column));
      }
      if (column < columns) {
        const int64_t at = start + column;
        const int lanes = int(columns - column);
        store(dx + at, calculate(load(x + at, lanes), load(dy + at, lanes), column), lanes);
      }
    });
  }

  void reduce(int threads) const { accumulators.reduce(tensors.dgamma, tensors.dbeta, threads); }
};

}  // namespace columns

void run_columns(const Call& call, int threads) {
  run_family<columns::Forward, columns::Backward>(call, threads);
}

}  // namespace normwise::NORMWISE_ISA
