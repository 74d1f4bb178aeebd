// Norms whose sets are rows: layer and RMS norm over trailing axes, group norm without positions. x
// is (outer, groups, members), and the members of a set lie side by side.
//
// A unit is a batch: some rows of one group, few enough to stay in the first cache from one pass to
// the next. It is one piece and one block. The statistics of its rows are the lanes of a vector,
// one to a row: a root, a quotient and a sum of lanes cost as much as a short row, and so are taken
// of all rows at once. So a batch has no more rows than a vector has lanes.
#include "kernel.h"

namespace normwise::NORMWISE_ISA {
namespace rows {

// The elements of a batch that the first cache holds.
constexpr int64_t kBatchElements = 1 << 11;
// Rows shorter than a page that come from memory: so much of them is a batch, forward and backward.
// Memory must not wait while a batch goes through its steps, and hands out a page sooner in order
// than in several places.
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kStreamedBytes[] = {4096, 1024};
// So many rows' gradients of gamma and beta are added up in registers before they go to memory.
template <class T>
constexpr int kRowsTogether = std::min(4, kLanes<ArithmeticOf<T>>);

template <class T>
struct Batches {
  using A = ArithmeticOf<T>;

  int64_t samples, outer, groups, members;  // outer is that of a sample
  int64_t rows;                             // of a batch; the last of a group may have fewer
  int64_t per_group;                        // batches
  int64_t units_per_chunk;

  explicit Batches(const Call& call)
      : samples(call.norm.samples),
        outer(call.norm.outer / samples),
        groups(call.norm.groups),
        members(call.norm.members) {
    const int64_t row_bytes = members * int64_t(sizeof(T));
    // Not so where samples have sums of their own, which would be other ones in a larger batch.
    rows = !call.norm.per_sample && call.from_memory && row_bytes < kPageBytes
               ? kStreamedBytes[call.dy != nullptr] / row_bytes
               : std::max<int64_t>(kRowsTogether<T>, kBatchElements / members);
    rows = std::clamp<int64_t>(rows, 1, kLanes<A>);
    per_group = (outer + rows - 1) / rows;
    // A chunk has two sums for every member, each of as many terms as it has rows: at least 32, so
    // that the sums are few beside the elements, and at most 2,048, for their roundings.
    const int64_t fewest = std::max(kElementsPerThread / (rows * members), 32 / rows);
    units_per_chunk = std::min(std::max((per_group * groups + 63) / 64, fewest), 2048 / rows);
  }

  Split split() const { return {samples, groups * per_group, 1, rows * members, units_per_chunk}; }

  // From one row of a unit to the next, in x and in the statistics.
  int64_t stride() const { return groups * members; }
  int64_t statistics_stride() const { return groups * 2; }

  // Of one unit: how many rows it has, and where these begin in x, the gammas of their group in
  // Parameters and in the sums of their sample, and their means in the statistics.
  struct Place {
    int64_t rows, offset, parameters, sums, statistics;
  };
  Place place(int64_t unit) const {
    const int64_t of_all = samples * groups == 1 ? 0 : unit / per_group;  // groups of all samples
    const int64_t sample = samples == 1 ? 0 : of_all / groups;
    const int64_t group = of_all - sample * groups;
    const int64_t first = (unit - of_all * per_group) * rows;
    const int64_t row = sample * outer + first;
    return {std::min(rows, outer - first), (row * groups + group) * members,
            of_all * padded<T>(members), group * padded<T>(members), row * 2 * groups + group};
  }
};

// A number for each row of a batch, as one vector.
template <class T>
struct PerRow {
  using A = ArithmeticOf<T>;

  A values[kLanes<A>];

  A operator[](int64_t row) const { return values[row]; }
  A& operator[](int64_t row) { return values[row]; }
  void operator=(Vec<A> v) { std::memcpy(values, &v, sizeof v); }
  operator Vec<A>() const { return bit_cast<Vec<A>>(values); }
};

template <class T, Kind kind>
struct Forward {
  using A = ArithmeticOf<T>;

  Tensors<T> tensors;
  Batches<T> batches;
  Split split;
  Parameters<T> parameters;

  explicit Forward(const Call& call)
      : tensors(call),
        batches(call),
        split(batches.split()),
        parameters(tensors, batches.samples * batches.groups, batches.members) {}

  struct Scratch {
    typename Batches<T>::Place place;
    PerRow<T> mean = {}, inv_std = {}, rest = {};  // xhat = (x - mean) * inv_std - rest

    explicit Scratch(const Forward&) {}
  };

  void prepare(int64_t unit, Scratch& scratch) const { scratch.place = batches.place(unit); }

  // Of each row, the sum of its deviations d from a centre, and that of d * d.
  struct Sums {
    Vec<A> of, of_squares;
  };

  // The centre: 0, one that is given for each row, or the mean of the row's first few elements,
  // which is written to where the others are given.
  enum class From { kNothing, kCentre, kFew };

  struct Partial {
    Pack<T> of = {}, of_squares = {};

    void add(Pack<T> d) {
      of += d;
      of_squares += d * d;
    }
    friend Partial operator+(const Partial& a, const Partial& b) {
      return {a.of + b.of, a.of_squares + b.of_squares};
    }
  };

  // Of the first four elements, whose mean mostly lies half as far out as one of them. Quarters are
  // added, for a sum could overflow.
  A mean_of_few(const T* x) const {
    const int64_t apart = batches.members >= 4 ? 1 : 0;
    const A quarter = A(0.25);
    return (quarter * first_of(x) + quarter * first_of(x + apart)) +
           (quarter * first_of(x + 2 * apart) + quarter * first_of(x + 3 * apart));
  }

  // Which rows: -1 in their lanes.
  using Chosen = Vec<IntOf<A>>;

  // The sums over the first members of each row that is chosen, 0 for the others.
  template <From from>
  Sums sums_of(PerRow<T>& centre, int64_t members, const Scratch& scratch,
               const Chosen& chosen = ~Chosen{}) const {
    const T* x = tensors.x + scratch.place.offset;
    const int64_t rows = scratch.place.rows, whole = members / kPack<T> * kPack<T>;
    const int lanes = int(members - whole);
    Vec<A> of[kLanes<A>], of_squares[kLanes<A>];
    for (int64_t row = 0; row < rows; ++row, x += batches.stride()) {
      if (chosen[row] == 0) {
        of[row] = of_squares[row] = Vec<A>{};
        continue;
      }
      if constexpr (from == From::kFew) centre[row] = mean_of_few(x);
      const auto deviation = [c = centre[row]](Pack<T> v) -> Pack<T> {
        if constexpr (from == From::kNothing) return v;
        return v - c;
      };
      Partial sum;
      int64_t i = 0;
      if (whole >= 4 * kPack<T>) {
        Partial part[4];
        for (; i + 4 * kPack<T> <= whole; i += 4 * kPack<T>) {
          for (int v = 0; v < 4; ++v) part[v].add(deviation(load(x + i + v * kPack<T>)));
        }
        sum = (part[0] + part[1]) + (part[2] + part[3]);
      }
      for (; i < whole; i += kPack<T>) sum.add(deviation(load(x + i)));
      if (lanes > 0) sum.add(keep(deviation(load(x + i, lanes)), lanes));
      of[row] = together(sum.of);
      of_squares[row] = together(sum.of_squares);
    }
    for (int64_t row = rows; row < kLanes<A>; ++row) of[row] = of_squares[row] = Vec<A>{};
    return {from == From::kNothing ? Vec<A>{} : sums<A>(of), sums<A>(of_squares)};
  }

  void gather(int64_t, int64_t, int64_t, Scratch& scratch) const {
    for (int64_t row = 0; row < scratch.place.rows; ++row) {
      const int64_t begin = scratch.place.offset + row * batches.stride();
      tensors.add(begin, begin + batches.members);
    }
    const A size = A(batches.members);
    Vec<A> rest = {}, variance;
    if (tensors.norm.subtract_mean) {
      // The centre is the mean of a few elements, or if there are many that of some, found so:
      // equal elements have exactly their own mean, and no sum grows with it.
      PerRow<T> centre = {};
      constexpr int64_t kSome = 4 * kPack<T>;
      Sums found;
      if (batches.members > 4 * kSome) {
        const Vec<A> some = sums_of<From::kFew>(centre, kSome, scratch).of / A(kSome);
        centre = Vec<A>(centre) + some;
        found = sums_of<From::kCentre>(centre, batches.members, scratch);
      } else {
        found = sums_of<From::kFew>(centre, batches.members, scratch);
      }
      const Vec<A> deviation = found.of / size;
      const Vec<A> mean = Vec<A>(centre) + deviation;
      scratch.mean = mean;
      rest = deviation - (mean - Vec<A>(centre));  // what the mean lost when it was rounded
      variance = found.of_squares / size - deviation * deviation;
      // The difference has the more roundings the farther out the centre lies, and so has the mean.
      // One row of 200 of normal numbers has one that far out, and is summed up from its mean.
      const Chosen far = deviation * deviation > A(2) * variance;
      if (sum<A>(far ? splat(A(1)) : Vec<A>{}) > 0) {
        found = sums_of<From::kCentre>(scratch.mean, batches.members, scratch, far);
        rest = far ? found.of / size : rest;
        variance = far ? found.of_squares / size - rest * rest : variance;
      }
    } else {
      PerRow<T> none = {};
      variance = sums_of<From::kNothing>(none, batches.members, scratch).of_squares / size;
    }
    const Vec<A> radicand = variance + A(tensors.norm.epsilon);
    const Vec<A> inv_std = radicand == A(0) ? Vec<A>{} : A(1) / square_root<A>(radicand);
    scratch.inv_std = inv_std;
    scratch.rest = rest * inv_std;
  }

  void settle(int64_t, int64_t, Scratch& scratch) const {
    A* statistics = tensors.statistics + scratch.place.statistics;
    for (int64_t row = 0; row < scratch.place.rows; ++row) {
      statistics[0] = scratch.mean[row];
      statistics[batches.groups] = scratch.inv_std[row];
      statistics += batches.statistics_stride();
    }
  }

  void apply(int64_t, int64_t, const Scratch& scratch) const {
    const auto& place = scratch.place;
    const A* gamma = parameters.gamma.data() + place.parameters;
    const A* beta = parameters.beta.data() + place.parameters;
    const int64_t members = batches.members;
    const T* x = tensors.x + place.offset;
    T* y = tensors.y + place.offset;
    for (int64_t row = 0; row < place.rows; ++row, x += batches.stride(), y += batches.stride()) {
      const A mean = scratch.mean[row], inv_std = scratch.inv_std[row], rest = scratch.rest[row];
      for_packs<T>(0, members, [&](int64_t i, auto... lanes) {
        const Pack<T> xhat = (load(x + i, lanes...) - mean) * inv_std - rest;
        const Pack<T> z = xhat * read<T>(gamma + i) + read<T>(beta + i);
        store(y + i, activate<kind>(z, tensors.norm.activation, tensors.slope), lanes...);
      });
    }
  }
};

template <class T, Kind kind>
struct Backward {
  using A = ArithmeticOf<T>;

  Tensors<T> tensors;
  Batches<T> batches;
  Split split;
  Parameters<T> parameters;
  Accumulators<A> accumulators;  // in pack order, as the parameters

  explicit Backward(const Call& call)
      : tensors(call),
        batches(call),
        split(batches.split()),
        parameters(tensors, batches.samples * batches.groups, batches.members),
        accumulators(split, batches.groups * padded<T>(batches.members), call) {}

  struct Scratch {
    typename Batches<T>::Place place;
    PerRow<T> mean = {}, inv_std = {};
    // dx = g * inv_std - (offset + (x - mean) * pull), where g = gamma * dz.
    PerRow<T> offset = {}, pull = {};

    explicit Scratch(const Backward&) {}
  };

  void prepare(int64_t unit, Scratch& scratch) const {
    scratch.place = batches.place(unit);
    const A* statistics = tensors.statistics + scratch.place.statistics;
    for (int64_t row = 0; row < scratch.place.rows; ++row) {
      scratch.mean[row] = statistics[0];
      scratch.inv_std[row] = statistics[batches.groups];
      statistics += batches.statistics_stride();
    }
  }

  // dz, the gradient with respect to what the activation was given.
  Pack<T> gradient(Pack<T> dy, Pack<T> xhat, Pack<T> gamma, const A* beta) const {
    if constexpr (kind == Kind::kIdentity) return dy;
    return deactivate<kind>(dy, xhat * gamma + read<T>(beta), tensors.norm.activation,
                            tensors.slope);
  }

  void gather(int64_t, int64_t, int64_t chunk, Scratch& scratch) const {
    const int64_t rows = scratch.place.rows;
    Vec<A> g_sums[kLanes<A>], gx_sums[kLanes<A>];
    int64_t row = 0;
    for (; row + kRowsTogether<T> <= rows; row += kRowsTogether<T>) {
      gather_rows<kRowsTogether<T>>(row, chunk, scratch, g_sums + row, gx_sums + row);
    }
    for (; row + 2 <= rows; row += 2) {
      gather_rows<2>(row, chunk, scratch, g_sums + row, gx_sums + row);
    }
    for (; row < rows; ++row) gather_rows<1>(row, chunk, scratch, g_sums + row, gx_sums + row);
    for (; row < kLanes<A>; ++row) g_sums[row] = gx_sums[row] = Vec<A>{};
    const A size = A(batches.members);
    const Vec<A> inv_std = scratch.inv_std;
    if (tensors.norm.subtract_mean) scratch.offset = inv_std * (sums<A>(g_sums) / size);
    scratch.pull = inv_std * inv_std * (sums<A>(gx_sums) / size);
  }

  // Sums up g and g * xhat over each of some rows, and dz * xhat and dz over all of them.
  template <int Rows>
  void gather_rows(int64_t row, int64_t chunk, const Scratch& scratch, Vec<A>* g_sums,
                   Vec<A>* gx_sums) const {
    const auto& place = scratch.place;
    const int64_t stride = batches.stride();
    const T* x = tensors.x + place.offset + row * stride;
    const T* dy = tensors.dy + place.offset + row * stride;
    const A* gamma_at = parameters.gamma.data() + place.parameters;
    const A* beta_at = parameters.beta.data() + place.parameters;
    const bool wanted = accumulators.wanted();
    A* dgamma = wanted ? accumulators.dgamma(chunk) + place.sums : nullptr;
    A* dbeta = wanted ? accumulators.dbeta(chunk) + place.sums : nullptr;
    A mean[Rows], inv_std[Rows];
    std::copy_n(scratch.mean.values + row, Rows, mean);
    std::copy_n(scratch.inv_std.values + row, Rows, inv_std);
    Pack<T> g_sum[Rows] = {}, gx_sum[Rows] = {};
    for_packs<T>(0, batches.members, [&](int64_t i, auto... lanes) {
      const Pack<T> gamma = read<T>(gamma_at + i);
      Pack<T> dz_sum = {}, dzx_sum = {};
      for (int k = 0; k < Rows; ++k) {
        const Pack<T> xhat = (load(x + k * stride + i, lanes...) - mean[k]) * inv_std[k];
        const Pack<T> dz = gradient(load(dy + k * stride + i, lanes...), xhat, gamma, beta_at + i);
        dz_sum += dz;
        dzx_sum += dz * xhat;
        const Pack<T> g = dz * gamma;
        g_sum[k] += keep(g, lanes...);
        gx_sum[k] += keep(g * xhat, lanes...);
      }
      if (wanted) {
        write<T>(dgamma + i, read<T>(dgamma + i) + dzx_sum);
        write<T>(dbeta + i, read<T>(dbeta + i) + dz_sum);
      }
    });
    for (int k = 0; k < Rows; ++k) {
      g_sums[k] = together(g_sum[k]);
      gx_sums[k] = together(gx_sum[k]);
    }
  }

  void settle(int64_t, int64_t, Scratch&) const {}

  void apply(int64_t, int64_t, const Scratch& scratch) const {
    const auto& place = scratch.place;
    const A* gamma_at = parameters.gamma.data() + place.parameters;
    const A* beta_at = parameters.beta.data() + place.parameters;
    const int64_t members = batches.members;
    const T *x = tensors.x + place.offset, *dy = tensors.dy + place.offset;
    const Gradient<T> dx = tensors.dx;
    int64_t at = place.offset;
    for (int64_t row = 0; row < place.rows; ++row) {
      const A mean = scratch.mean[row], inv_std = scratch.inv_std[row];
      const A offset = scratch.offset[row], pull = scratch.pull[row];
      for_packs<T>(0, members, [&](int64_t i, auto... lanes) {
        const Pack<T> gamma = read<T>(gamma_at + i);
        const Pack<T> deviation = load(x + i, lanes...) - mean;
        const Pack<T> dz =
            gradient(load(dy + i, lanes...), deviation * inv_std, gamma, beta_at + i);
        dx.put(at + i, dz * gamma * inv_std - (deviation * pull + offset), lanes...);
      });
      x += batches.stride();
      dy += batches.stride();
      at += batches.stride();
    }
  }

  void reduce(int threads) const {
    std::vector<A> dgamma(parameters.gamma.size()), dbeta(dgamma.size());
    accumulators.reduce(dgamma.data(), dbeta.data(), threads);
    const int64_t groups = batches.samples * batches.groups;
    Parameters<T>::restore(dgamma, tensors.dgamma, groups, batches.members);
    Parameters<T>::restore(dbeta, tensors.dbeta, groups, batches.members);
  }
};

}  // namespace rows

void run_rows(const Call& call, int threads) {
  run_family<rows::Forward, rows::Backward>(call, threads);
}

}  // namespace normwise::NORMWISE_ISA
