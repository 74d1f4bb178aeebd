// Group and instance norm, channels last: x is (outer, before, channels), and a row of memory holds
// an element of every set.
//
// A unit is one outer, and a piece some of its rows. These are read as lines: a line is one row, or
// where the channels are few or do not fill packs several, and column i of it is channel
// i % channels. What is left of the unit after the last whole line is its tail, a line of fewer
// columns, which belongs to the last piece. Strips (strips.h) are of lines.
#include "strips.h"

namespace normwise::NORMWISE_ISA {
namespace columns {

// So much of a unit is a piece: enough that merging its sums costs nothing beside it, and few
// enough for a core's cache.
constexpr int64_t kPieceBytes = 1 << 18;

template <class T>
struct Lines {
  using A = ArithmeticOf<T>;

  int64_t channels, rows_per_line, columns, lines, tail, lines_per_piece;

  explicit Lines(const Norm& norm) : channels(norm.groups * norm.members) {
    // Four packs at least, whose sums do not wait for each other; whole packs unless there are
    // many.
    const auto fits = [&] {
      return columns >= 4 * kPack<T> && (columns % kPack<T> == 0 || columns >= 8 * kPack<T>);
    };
    for (rows_per_line = 1, columns = channels; !fits(); columns *= 2) rows_per_line *= 2;
    lines = norm.before / rows_per_line;
    tail = norm.before % rows_per_line * channels;
    lines_per_piece = std::max(kBlockRows, kPieceBytes / (columns * int64_t(sizeof(T))));
  }

  int64_t pieces() const {
    return std::max<int64_t>(1, (lines + lines_per_piece - 1) / lines_per_piece);
  }
  int64_t begin(int64_t piece) const { return piece * lines_per_piece; }
  int64_t count(int64_t piece) const { return std::min(lines_per_piece, lines - begin(piece)); }
  bool has_tail(int64_t piece) const { return tail > 0 && piece == pieces() - 1; }
  int64_t tail_rows() const { return tail / channels; }
  int64_t rows(int64_t piece) const {
    return count(piece) * rows_per_line + (has_tail(piece) ? tail_rows() : 0);
  }

  // An array of `size` columns begins with a number for each channel: repeats these over all
  // columns, and brings the array into pack order.
  void spread(A* line, int64_t size) const {
    for (int64_t filled = channels; filled < size; filled *= 2) {
      std::copy(line, line + filled, line + filled);
    }
    std::fill(line + size, line + padded<T>(size), A(0));
    to_pack_order<T>(line, padded<T>(size));
  }

  // The reverse for sums: adds up the columns of each channel, in natural order.
  void fold(A* line, int64_t size) const {
    to_natural_order<T>(line, padded<T>(size));
    while (size > channels) {
      size /= 2;
      for (int64_t i = 0; i < size; ++i) line[i] += line[size + i];
    }
  }

  // Calls f(offset, step, columns, count) for the strips that cover a piece: `count` lines of
  // `columns` columns, the first at `offset` from the start of the unit and each of the others
  // `step` elements after the one before.
  template <class F>
  void for_strips_of(int64_t piece, const F& f) const {
    for_strips<kWrittenRows>(count(piece), [&](int64_t line, int64_t step, auto count) {
      f((begin(piece) + line) * columns, step * columns, columns, count);
    });
    if (has_tail(piece)) f(lines * columns, 0, tail, std::integral_constant<int, 1>());
  }
};

Split split_columns(const Norm& norm, int64_t pieces) {
  const int64_t unit_elements = norm.before * norm.groups * norm.members;
  const int64_t fewest = std::max<int64_t>(1, kElementsPerThread / unit_elements);
  const int64_t units = norm.outer / norm.samples;
  return {norm.samples, units, pieces, unit_elements, std::max((units + 63) / 64, fewest)};
}

// Calls f with the number of channels that a group has: as a constant where that is 1, as in
// instance norm, so that loops over groups become vectors.
template <class F>
inline void with_members(int64_t members, const F& f) {
  members == 1 ? f(std::integral_constant<int64_t, 1>()) : f(members);
}

// Some of the columns, few enough for the first cache to hold their sums: all of them, or those of
// whole groups, or some of one group. For each group it has a centre, and of the lines that were
// summed up last the sums of their deviations d from that centre and of d * d.
template <class T>
class Window {
 public:
  using A = ArithmeticOf<T>;

  Window(const Lines<T>& shape, const Norm& norm, int64_t first)
      : shape_(shape), first_(first), group_(first / norm.members) {
    const int64_t whole_groups = kWindow / norm.members * norm.members;
    const int64_t rest_of_group = (group_ + 1) * norm.members - first;
    const int64_t most = shape.columns <= kWindow ? kWindow
                         : whole_groups > 0       ? whole_groups
                                                  : std::min(kWindow, rest_of_group);
    columns_ = std::min(most, shape.columns - first);
    members_ = std::min(norm.members, columns_);
    groups_ = std::min(columns_, shape.channels) / members_;
    earlier_ = first - group_ * norm.members;
    std::fill(centres_, centres_ + groups_, 0.0);
  }

  int64_t end() const { return first_ + columns_; }
  int64_t group() const { return group_; }
  // How many elements of each group come before `rows` rows of a piece of `all` rows.
  int64_t elements_before(int64_t rows, int64_t all) const {
    return rows * members_ + all * earlier_;
  }

  // Sums up some lines of x, and the tail if it is not null.
  void sum_up(const T* x, int64_t lines, const T* tail) {
    A line[kWindow], sums[kWindow], squares[kWindow];
    with_members(members_, [&](auto members) {
      for (int64_t group = 0; group < groups_; ++group) {
        for (int64_t i = 0; i < members; ++i) line[group * members + i] = A(centres_[group]);
      }
    });
    shape_.spread(line, columns_);
    for (A* each : {sums, squares}) std::fill(each, each + padded<T>(columns_), A(0));
    add_moments(x + first_, shape_.columns, lines, columns_, line, sums, squares);
    if (tail != nullptr) add_moments(tail, 0, 1, shape_.tail, line, sums, squares);
    for (A* each : {sums, squares}) shape_.fold(each, columns_);
    with_members(members_, [&](auto members) {
      for (int64_t group = 0; group < groups_; ++group) {
        double sum = 0, square = 0;
        for (int64_t i = group * members; i < (group + 1) * members; ++i) {
          sum += double(sums[i]);
          square += double(squares[i]);
        }
        sums_[group] = sum;
        squares_[group] = square;
      }
    });
  }

  // Centres each group at its mean so far.
  void centre_at(const double* means) {
    for (int64_t group = 0; group < groups_; ++group) centres_[group] = double(A(means[group]));
  }

  // Centres each group at the mean of its first few lines. The deviations of these are summed up
  // from the group's first element.
  void centre_at_first_lines(const T* x, int64_t lines, const T* tail) {
    for (int64_t group = 0; group < groups_; ++group) {
      centres_[group] = double(first_of(x + first_ + group * members_));
    }
    const int64_t per_line = shape_.rows_per_line * members_;
    const int64_t enough = enough_for_centre(kBlockRows * per_line);
    const int64_t few = std::min(lines, (enough + per_line - 1) / per_line);
    sum_up(x, few, few == 0 ? tail : nullptr);
    const int64_t rows = few == 0 ? shape_.tail_rows() : few * shape_.rows_per_line;
    const double inverse = 1 / double(rows * members_);
    for (int64_t group = 0; group < groups_; ++group) {
      centres_[group] = double(A(centres_[group] + sums_[group] * inverse));
    }
  }

  // Adds the `rows` rows that were summed up last to the moments of each group, which are those of
  // `before` elements so far.
  void add_to(double* means, double* squares, int64_t before, int64_t rows,
              bool subtract_mean) const {
    add_block(groups_, double(before), double(rows * members_), subtract_mean, centres_, sums_,
              squares_, means, squares);
  }

 private:
  const Lines<T>& shape_;
  int64_t first_, columns_;
  int64_t group_, groups_;     // the first, and how many
  int64_t members_, earlier_;  // channels of a group in this window, and in those before
  double centres_[kWindow], sums_[kWindow], squares_[kWindow];
};

template <class T, Kind kind>
struct Forward {
  using A = ArithmeticOf<T>;

  Tensors<T> tensors;
  Lines<T> shape;
  Split split;

  explicit Forward(const Call& call)
      : tensors(call), shape(call.norm), split(split_columns(call.norm, shape.pieces())) {}

  struct Scratch {
    std::vector<double> means, squares;  // the moments of every group, piece by piece
    std::vector<A> mean, scale, shift;   // of every column: y = (x - mean) * scale + shift

    explicit Scratch(const Forward& job)
        : means(size_t(job.split.pieces * job.tensors.norm.groups)),
          squares(means.size()),
          mean(size_t(padded<T>(job.shape.columns))),
          scale(mean.size()),
          shift(mean.size()) {}
  };

  void prepare(int64_t, Scratch&) const {}

  // Block by block, each read once. What is summed up are the deviations from the mean of the
  // blocks before, and in the first from that of a few lines.
  void gather(int64_t unit, int64_t piece, int64_t, Scratch& scratch) const {
    const T* x = tensors.x + unit * split.unit_elements;
    const bool subtract_mean = tensors.norm.subtract_mean;
    const int64_t end = shape.begin(piece) + shape.count(piece);
    const int64_t start = unit * split.unit_elements;
    tensors.add(start + shape.begin(piece) * shape.columns,
                start + end * shape.columns + (shape.has_tail(piece) ? shape.tail : 0));
    for (int64_t first = 0; first < shape.columns;) {
      Window<T> window(shape, tensors.norm, first);
      double* means = scratch.means.data() + piece * tensors.norm.groups + window.group();
      double* squares = scratch.squares.data() + piece * tensors.norm.groups + window.group();
      int64_t line = shape.begin(piece), rows_before = 0;
      do {
        const int64_t lines = std::min(kBlockRows, end - line);
        const bool has_tail = shape.has_tail(piece) && line + lines == end;
        const T* block = x + line * shape.columns;
        const T* tail = has_tail ? x + shape.lines * shape.columns : nullptr;
        const int64_t before = window.elements_before(rows_before, shape.rows(piece));
        if (subtract_mean) {
          before > 0 ? window.centre_at(means) : window.centre_at_first_lines(block, lines, tail);
        }
        window.sum_up(block, lines, tail);
        const int64_t rows = lines * shape.rows_per_line + (has_tail ? shape.tail_rows() : 0);
        window.add_to(means, squares, before, rows, subtract_mean);
        rows_before += rows;
        line += lines;
      } while (line < end);
      first = window.end();
    }
  }

  void settle(int64_t unit, int64_t, Scratch& scratch) const {
    const Norm& norm = tensors.norm;
    const int64_t groups = norm.groups;
    double *means = scratch.means.data(), *squares = scratch.squares.data();
    double count = double(shape.rows(0) * norm.members);
    for (int64_t piece = 1; piece < split.pieces; ++piece) {
      const double more = double(shape.rows(piece) * norm.members);
      merge(groups, count, more, means, squares, [&](int64_t i) {
        return std::array<double, 2>{means[piece * groups + i], squares[piece * groups + i]};
      });
      count += more;
    }
    A* statistics = tensors.statistics + unit * 2 * groups;
    for (int64_t i = 0; i < groups; ++i) statistics[i] = A(means[i]);
    for (int64_t i = 0; i < groups; ++i) {
      statistics[groups + i] = A(inverse_root(squares[i] / count, norm.epsilon));
    }
    const int64_t parameter = norm.parameter(unit);
    with_members(norm.members, [&](auto members) {
      for (int64_t group = 0; group < groups; ++group) {
        const A inv_std = statistics[groups + group];
        const A rest = A(double(statistics[group]) - means[group]);
        for (int64_t i = group * members; i < (group + 1) * members; ++i) {
          scratch.mean[size_t(i)] = statistics[group];
          scratch.scale[size_t(i)] = inv_std * tensors.gamma_at(parameter + i);
          scratch.shift[size_t(i)] =
              tensors.beta_at(parameter + i) + rest * scratch.scale[size_t(i)];
        }
      }
    });
    for (auto* line : {&scratch.mean, &scratch.scale, &scratch.shift}) {
      shape.spread(line->data(), shape.columns);
    }
  }

  void apply(int64_t unit, int64_t piece, const Scratch& scratch) const {
    const T* x = tensors.x + unit * split.unit_elements;
    T* y = tensors.y + unit * split.unit_elements;
    shape.for_strips_of(piece, [&](int64_t offset, int64_t step, int64_t columns, auto count) {
      constexpr int K = count;
      for_packs<T>(0, columns, [&](int64_t column, auto... lanes) {
        const Pack<T> mean = read<T>(scratch.mean.data() + column);
        const Pack<T> scale = read<T>(scratch.scale.data() + column);
        const Pack<T> shift = read<T>(scratch.shift.data() + column);
        // All are loaded before one is stored: the CPU takes a load for dependent on a store whose
        // address has the same last 12 bits, as rows that are a power of two apart have.
        Pack<T> v[K];
        for (int k = 0; k < K; ++k) v[k] = load(x + offset + k * step + column, lanes...);
        for (int k = 0; k < K; ++k) {
          const Pack<T> z = (v[k] - mean) * scale + shift;
          store(y + offset + k * step + column,
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
  Lines<T> shape;
  Split split;
  Accumulators<double> accumulators;

  explicit Backward(const Call& call)
      : tensors(call),
        shape(call.norm),
        split(split_columns(call.norm, shape.pieces())),
        accumulators(split, shape.channels, call) {}

  struct Scratch {
    // The sums of dz and of dz * (x - mean) of every channel, piece by piece.
    std::vector<double> dz, dzx;
    // Of every column: xhat = (x - mean) * inv_std, z = xhat * gamma + beta, and
    // dx = dz * factor - (offset + (x - mean) * pull).
    std::vector<A> mean, inv_std, gamma, beta, factor, offset, pull;

    explicit Scratch(const Backward& job)
        : dz(size_t(job.split.pieces * job.shape.channels)),
          dzx(dz.size()),
          mean(size_t(padded<T>(job.shape.columns))),
          inv_std(mean.size()),
          gamma(mean.size()),
          beta(mean.size()),
          factor(mean.size()),
          offset(mean.size()),
          pull(mean.size()) {}
  };

  // What the statistics and parameters say of each column, before any sum is known.
  void prepare(int64_t unit, Scratch& scratch) const {
    const int64_t groups = tensors.norm.groups, members = tensors.norm.members;
    const A* statistics = tensors.statistics + unit * 2 * groups;
    const int64_t parameter = tensors.norm.parameter(unit);
    for (int64_t i = 0; i < shape.channels; ++i) {
      const size_t channel = size_t(i);
      scratch.mean[channel] = statistics[i / members];
      scratch.inv_std[channel] = statistics[groups + i / members];
      scratch.gamma[channel] = tensors.gamma_at(parameter + i);
      scratch.beta[channel] = tensors.beta_at(parameter + i);
    }
    for (auto* line : {&scratch.mean, &scratch.inv_std, &scratch.gamma, &scratch.beta}) {
      shape.spread(line->data(), shape.columns);
    }
    std::fill(scratch.dz.begin(), scratch.dz.end(), 0.0);
    std::fill(scratch.dzx.begin(), scratch.dzx.end(), 0.0);
  }

  // The gradient with respect to what the activation was given; x is already without its mean.
  Pack<T> gradient(Pack<T> dy, Pack<T> deviation, int64_t column, const Scratch& scratch) const {
    if constexpr (kind == Kind::kIdentity) return dy;
    const Pack<T> xhat = deviation * read<T>(scratch.inv_std.data() + column);
    const Pack<T> z =
        xhat * read<T>(scratch.gamma.data() + column) + read<T>(scratch.beta.data() + column);
    return deactivate<kind>(dy, z, tensors.norm.activation, tensors.slope);
  }

  void gather(int64_t unit, int64_t piece, int64_t, Scratch& scratch) const {
    const int64_t start = unit * split.unit_elements;
    A dz[kWindow], dzx[kWindow];
    // Adds the sums over some lines, `offset` elements from the start of the unit.
    const auto add = [&](int64_t offset, int64_t lines, int64_t first, int64_t columns) {
      const T *x = tensors.x + start + offset, *dy = tensors.dy + start + offset;
      for_strips<kReadRows / 2>(lines, [&](int64_t line, int64_t step, auto count) {
        for_packs<T>(0, columns, [&](int64_t column, auto... lanes) {
          const Pack<T> mean = read<T>(scratch.mean.data() + first + column);
          Pack<T> dz_sum = read<T>(dz + column), dzx_sum = read<T>(dzx + column);
          for (int k = 0; k < count; ++k) {
            const int64_t at = (line + k * step) * shape.columns + first + column;
            const Pack<T> deviation = load(x + at, lanes...) - mean;
            const Pack<T> g = gradient(load(dy + at, lanes...), deviation, first + column, scratch);
            dz_sum += keep(g, lanes...);
            dzx_sum += keep(g * deviation, lanes...);
          }
          write<T>(dz + column, dz_sum);
          write<T>(dzx + column, dzx_sum);
        });
      });
    };
    const int64_t end = shape.begin(piece) + shape.count(piece);
    for (int64_t first = 0; first < shape.columns; first += kWindow) {
      const int64_t columns = std::min(kWindow, shape.columns - first);
      const int64_t channels = std::min(columns, shape.channels);
      int64_t line = shape.begin(piece);
      do {
        const int64_t lines = std::min(kBlockRows, end - line);
        for (A* sums : {dz, dzx}) std::fill(sums, sums + padded<T>(columns), A(0));
        add(line * shape.columns, lines, first, columns);
        line += lines;
        if (shape.has_tail(piece) && line == end) add(line * shape.columns, 1, 0, shape.tail);
        for (A* sums : {dz, dzx}) shape.fold(sums, columns);
        const size_t of_piece = size_t(piece * shape.channels + first);
        for (int64_t i = 0; i < channels; ++i) scratch.dz[of_piece + size_t(i)] += double(dz[i]);
        for (int64_t i = 0; i < channels; ++i) scratch.dzx[of_piece + size_t(i)] += double(dzx[i]);
      } while (line < end);
    }
  }

  void settle(int64_t unit, int64_t chunk, Scratch& scratch) const {
    const Norm& norm = tensors.norm;
    const A* statistics = tensors.statistics + unit * 2 * norm.groups;
    const double size = double(norm.before * norm.members);
    const int64_t parameter = norm.parameter(unit);
    for (int64_t group = 0; group < norm.groups; ++group) {
      const double inv_std = double(statistics[norm.groups + group]);
      double g_sum = 0, gx_sum = 0;  // of g = gamma * dz, and of g * xhat
      const int64_t begin = group * norm.members, end = begin + norm.members;
      for (int64_t channel = begin; channel < end; ++channel) {
        double dz = 0, dzx = 0;
        for (int64_t piece = 0; piece < split.pieces; ++piece) {
          dz += scratch.dz[size_t(piece * shape.channels + channel)];
          dzx += scratch.dzx[size_t(piece * shape.channels + channel)];
        }
        dzx *= inv_std;
        if (accumulators.wanted()) {
          accumulators.dgamma(chunk)[channel] += dzx;
          accumulators.dbeta(chunk)[channel] += dz;
        }
        const double gamma = double(tensors.gamma_at(parameter + channel));
        g_sum += gamma * dz;
        gx_sum += gamma * dzx;
      }
      const A offset = norm.subtract_mean ? A(inv_std * g_sum / size) : A(0);
      for (int64_t i = begin; i < end; ++i) {
        const size_t channel = size_t(i);
        scratch.factor[channel] = A(inv_std) * tensors.gamma_at(parameter + i);
        scratch.offset[channel] = offset;
        scratch.pull[channel] = A(inv_std * inv_std * gx_sum / size);
      }
    }
    for (auto* line : {&scratch.factor, &scratch.offset, &scratch.pull}) {
      shape.spread(line->data(), shape.columns);
    }
  }

  void apply(int64_t unit, int64_t piece, const Scratch& scratch) const {
    const T* x = tensors.x + unit * split.unit_elements;
    const T* dy = tensors.dy + unit * split.unit_elements;
    const Gradient<T> dx = tensors.dx;
    shape.for_strips_of(piece, [&](int64_t start, int64_t step, int64_t columns, auto count) {
      constexpr int K = count;
      for_packs<T>(0, columns, [&](int64_t column, auto... lanes) {
        const Pack<T> mean = read<T>(scratch.mean.data() + column);
        const Pack<T> factor = read<T>(scratch.factor.data() + column);
        const Pack<T> offset = read<T>(scratch.offset.data() + column);
        const Pack<T> pull = read<T>(scratch.pull.data() + column);
        Pack<T> deviation[K], dz[K];
        for (int k = 0; k < K; ++k) {
          const int64_t at = start + k * step + column;
          deviation[k] = load(x + at, lanes...) - mean;
          dz[k] = gradient(load(dy + at, lanes...), deviation[k], column, scratch);
        }
        for (int k = 0; k < K; ++k) {
          dx.put(unit * split.unit_elements + start + k * step + column,
                 dz[k] * factor - (offset + deviation[k] * pull), lanes...);
        }
      });
    });
  }

  void reduce(int threads) const { accumulators.reduce(tensors.dgamma, tensors.dbeta, threads); }
};

}  // namespace columns

void run_columns(const Call& call, int threads) {
  run_family<columns::Forward, columns::Backward>(call, threads);
}

}  // namespace normwise::NORMWISE_ISA
