// Norms whose sets lie in memory in one piece, or in few long runs: layer and RMS norm over
// trailing axes, group and instance norm channels first.
//
// A unit is one set, `before` runs of members * after elements. Where after is 1 each element of a
// run has a gamma of its own, else each stretch of `after` elements.
#include "kernel.h"

namespace normwise::NORMWISE_ISA {
namespace rows {

// Read twice, and still in the first cache the second time.
constexpr int64_t kBlockElements = 2048;
// A piece of a long set, to be read by one thread.
constexpr int64_t kPieceElements = 1 << 16;

// Adds the elements of a run to the moments, block by block.
template <class T>
void add_run(const T* x, int64_t elements, bool centred, Moments& moments) {
  using A = ArithmeticOf<T>;
  constexpr int L = kLanes<A>;
  for (int64_t begin = 0; begin < elements; begin += kBlockElements) {
    const T* block = x + begin;
    const int64_t count = std::min(kBlockElements, elements - begin);
    const int64_t whole = count / L * L;
    const int lanes = int(count - whole);
    const double n = double(count);
    A centre = 0;
    double mean = 0;
    if (centred) {
      // The first element is subtracted: equal elements have exactly their own mean.
      const A first = load(block, 1)[0];
      Vec<A> sums[4] = {};
      int64_t i = 0;
      for (; i + 4 * L <= whole; i += 4 * L) {
        for (int v = 0; v < 4; ++v) sums[v] += load(block + i + v * L) - first;
      }
      for (; i < whole; i += L) sums[0] += load(block + i) - first;
      if (lanes > 0) sums[1] += keep<A>(load(block + i, lanes) - first, lanes);
      mean = double(first) + double(sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]))) / n;
      centre = A(mean);
    }
    Vec<A> squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * L <= whole; i += 4 * L) {
      for (int v = 0; v < 4; ++v) {
        const Vec<A> d = load(block + i + v * L) - centre;
        squares[v] += d * d;
      }
    }
    for (; i < whole; i += L) {
      const Vec<A> d = load(block + i) - centre;
      squares[0] += d * d;
    }
    if (lanes > 0) {
      const Vec<A> d = keep<A>(load(block + i, lanes) - centre, lanes);
      squares[1] += d * d;
    }
    const double rounding = mean - double(centre);
    const double total = double(sum<A>((squares[0] + squares[1]) + (squares[2] + squares[3])));
    moments.merge(n, mean, total - n * (rounding * rounding));
  }
}

// How a set lies in memory, and which gammas its elements have.
struct Sets {
  int64_t groups, before, members, after, run, pieces;
  bool gamma_per_element;

  explicit Sets(const NormwiseNorm& norm)
      : groups(norm.groups),
        before(norm.before),
        members(norm.members),
        after(norm.after),
        run(norm.members * norm.after),
        pieces(before == 1 ? std::max<int64_t>(1, (run + kPieceElements - 1) / kPieceElements) : 1),
        gamma_per_element(norm.after == 1) {}

  int64_t elements() const { return before * run; }
  // A division takes as long as a vector of 16 elements from load to store: not for layer norm.
  int64_t outer(int64_t unit) const { return groups == 1 ? unit : unit / groups; }
  int64_t group(int64_t unit) const { return groups == 1 ? 0 : unit % groups; }
  int64_t channel(int64_t unit) const { return group(unit) * members; }
  // Where the mean of a unit is in the statistics; 1 / standard deviation comes `groups` later.
  int64_t statistics(int64_t unit) const { return outer(unit) * 2 * groups + group(unit); }

  Split split(const NormwiseNorm& norm, bool sums_by_element) const {
    const int64_t units = norm.outer * groups, size = elements();
    int64_t per_chunk = std::max({int64_t(1), (units + 63) / 64, kElementsPerThread / size});
    // A chunk has two sums for every element of a set, each of as many terms as it has units: a few
    // at least, so that the sums are few beside the elements, and not too many for their roundings.
    if (sums_by_element) per_chunk = std::clamp<int64_t>(per_chunk, 4, 512);
    return {units, pieces, elements(), per_chunk};
  }

  // Calls f(start, end) for the runs of a piece, as offsets into x.
  template <class F>
  void for_runs(int64_t unit, int64_t piece, const F& f) const {
    for (int64_t index = 0; index < before; ++index) {
      const int64_t start = ((outer(unit) * before + index) * groups + group(unit)) * run;
      f(start, start + piece * kPieceElements,
        pieces == 1 ? start + run : std::min(start + run, start + (piece + 1) * kPieceElements));
    }
  }

  // Calls f(member, begin, end) for the stretches of one gamma between two offsets of a run.
  template <class F>
  void for_stretches(int64_t start, int64_t begin, int64_t end, const F& f) const {
    for (int64_t member = (begin - start) / after; begin < end; ++member) {
      const int64_t stop = std::min(end, start + (member + 1) * after);
      f(member, begin, stop);
      begin = stop;
    }
  }
};

// Gamma and beta as arrays, where they are none too.
template <class A>
class Parameters {
 public:
  template <class T>
  Parameters(const Tensors<T>& tensors, int64_t channels)
      : gamma(tensors.gamma), beta(tensors.beta) {
    if (gamma == nullptr) gamma = (ones_ = std::make_unique<A[]>(size_t(channels))).get();
    if (beta == nullptr) beta = (zeros_ = std::make_unique<A[]>(size_t(channels))).get();
    if (ones_) std::fill(ones_.get(), ones_.get() + channels, A(1));
  }

  const A *gamma, *beta;

 private:
  std::unique_ptr<A[]> ones_, zeros_;
};

// Calls whole(offset) for the whole vectors of a range, and rest(offset, lanes) for what is left.
template <class A, class Whole, class Rest>
inline void for_vectors(int64_t begin, int64_t end, const Whole& whole, const Rest& rest) {
  constexpr int L = kLanes<A>;
  for (; begin + L <= end; begin += L) whole(begin);
  if (begin < end) rest(begin, int(end - begin));
}

template <class T, Kind kind>
struct Forward {
  using A = ArithmeticOf<T>;
  // The steps of one short row wait for each other (sums, a root, a quotient), those of several do
  // not: 1.15 times as fast in float32 at 96 elements, 1.4 times in bfloat16. Backward it was
  // slower.
  static constexpr int64_t kUnitsAtOnce = 16;

  Tensors<T> tensors;
  Sets sets;
  Split split;
  Parameters<A> parameters;

  explicit Forward(const Call& call)
      : tensors(call),
        sets(call.norm),
        split(sets.split(call.norm, false)),
        parameters(tensors, sets.groups * sets.members) {}

  struct Scratch {
    std::vector<Moments> moments;       // piece by piece
    A mean = 0, inv_std = 0, rest = 0;  // xhat = (x - mean) * inv_std + rest

    explicit Scratch(const Forward& job) : moments(size_t(job.split.pieces)) {}
  };

  void prepare(int64_t, Scratch&) const {}

  void gather(int64_t unit, int64_t piece, int64_t, Scratch& scratch) const {
    Moments moments;
    sets.for_runs(unit, piece, [&](int64_t, int64_t begin, int64_t end) {
      add_run(tensors.x + begin, end - begin, tensors.norm.centred != 0, moments);
    });
    scratch.moments[size_t(piece)] = moments;
  }

  void settle(int64_t unit, int64_t, Scratch& scratch) const {
    Moments all = scratch.moments[0];
    for (size_t piece = 1; piece < scratch.moments.size(); ++piece) {
      const Moments& part = scratch.moments[piece];
      all.merge(part.count, part.mean, part.squares);
    }
    const double inv_std = inverse_root(all.squares / all.count, tensors.norm.epsilon);
    scratch.mean = A(all.mean);
    scratch.inv_std = A(inv_std);
    scratch.rest = A((double(scratch.mean) - all.mean) * inv_std);
    A* statistics = tensors.statistics + sets.statistics(unit);
    statistics[0] = scratch.mean;
    statistics[sets.groups] = scratch.inv_std;
  }

  void apply(int64_t unit, int64_t piece, const Scratch& scratch) const {
    const T* x = tensors.x;
    T* y = tensors.y;
    const A* gamma = parameters.gamma + sets.channel(unit);
    const A* beta = parameters.beta + sets.channel(unit);
    const auto finish = [&](Vec<A> z) {
      return activate<kind, A>(z, tensors.norm.activation, tensors.slope);
    };
    sets.for_runs(unit, piece, [&](int64_t start, int64_t begin, int64_t end) {
      if (sets.gamma_per_element) {
        const auto xhat = [&](Vec<A> v) {
          return (v - scratch.mean) * scratch.inv_std + scratch.rest;
        };
        for_vectors<A>(
            begin, end,
            [&](int64_t i) {
              const Vec<A> z = xhat(load(x + i)) * load(gamma + i - start) + load(beta + i - start);
              store(y + i, finish(z));
            },
            [&](int64_t i, int lanes) {
              const Vec<A> z = xhat(load(x + i, lanes)) * load(gamma + i - start, lanes) +
                               load(beta + i - start, lanes);
              store(y + i, finish(z), lanes);
            });
        return;
      }
      sets.for_stretches(start, begin, end, [&](int64_t member, int64_t from, int64_t to) {
        const A scale = scratch.inv_std * gamma[member];
        const A shift = scratch.rest * gamma[member] + beta[member];
        for_vectors<A>(
            from, to,
            [&](int64_t i) { store(y + i, finish((load(x + i) - scratch.mean) * scale + shift)); },
            [&](int64_t i, int lanes) {
              store(y + i, finish((load(x + i, lanes) - scratch.mean) * scale + shift), lanes);
            });
      });
    });
  }
};

template <class T, Kind kind>
struct Backward {
  using A = ArithmeticOf<T>;
  static constexpr int64_t kUnitsAtOnce = 1;
  static constexpr int L = kLanes<A>;

  Tensors<T> tensors;
  Sets sets;
  Split split;
  Parameters<A> parameters;
  Accumulators<A> accumulators;

  explicit Backward(const Call& call)
      : tensors(call),
        sets(call.norm),
        split(sets.split(call.norm, sets.gamma_per_element)),
        parameters(tensors, sets.groups * sets.members),
        accumulators(split.chunks(), sets.groups * sets.members,
                     call.dgamma != nullptr || call.dbeta != nullptr) {}

  struct Scratch {
    // Sums of g = gamma * dz and of g * xhat over the set, piece by piece.
    std::vector<double> g, gx;
    // Where a gamma has a stretch: sums of dz and of dz * xhat, member by member of a piece.
    std::vector<double> dz, dzx;
    A mean = 0, inv_std = 0, offset = 0, pull = 0;  // dx = g * inv_std - (offset + xhat * pull)

    explicit Scratch(const Backward& job)
        : g(size_t(job.split.pieces)),
          gx(g.size()),
          dz(job.sets.gamma_per_element ? 0 : size_t(job.split.pieces * job.sets.members)),
          dzx(dz.size()) {}
  };

  void prepare(int64_t unit, Scratch& scratch) const {
    const A* statistics = tensors.statistics + sets.statistics(unit);
    scratch.mean = statistics[0];
    scratch.inv_std = statistics[sets.groups];
    std::fill(scratch.dz.begin(), scratch.dz.end(), 0.0);
    std::fill(scratch.dzx.begin(), scratch.dzx.end(), 0.0);
  }

  // dz, the gradient with respect to what the activation was given.
  template <class P>
  Vec<A> gradient(Vec<A> dy, Vec<A> xhat, P gamma, P beta) const {
    if constexpr (kind == Kind::kIdentity) return dy;
    return deactivate<kind, A>(dy, xhat * gamma + beta, tensors.norm.activation, tensors.slope);
  }

  void gather(int64_t unit, int64_t piece, int64_t chunk, Scratch& scratch) const {
    if (sets.gamma_per_element) {
      gather_elements(unit, piece, chunk, scratch);
    } else {
      gather_stretches(unit, piece, scratch);
    }
  }

  void gather_elements(int64_t unit, int64_t piece, int64_t chunk, Scratch& scratch) const {
    const int64_t channel = sets.channel(unit);
    const A *gamma = parameters.gamma + channel, *beta = parameters.beta + channel;
    const bool wanted = accumulators.wanted();
    A* dgamma = wanted ? accumulators.dgamma(chunk) + channel : nullptr;
    A* dbeta = wanted ? accumulators.dbeta(chunk) + channel : nullptr;
    double g_total = 0, gx_total = 0;
    sets.for_runs(unit, piece, [&](int64_t start, int64_t begin, int64_t end) {
      const T *x = tensors.x + start, *dy = tensors.dy + start;
      for (int64_t from = begin - start; from < end - start; from += kBlockElements) {
        const int64_t to = std::min(end - start, from + kBlockElements);
        Vec<A> g_sums[2] = {}, gx_sums[2] = {};
        int64_t i = from;
        const auto add = [&](int which, auto... lanes) {
          const Vec<A> xhat = (load(x + i, lanes...) - scratch.mean) * scratch.inv_std;
          const Vec<A> scale = load(gamma + i, lanes...);
          const Vec<A> dz = gradient(load(dy + i, lanes...), xhat, scale, load(beta + i, lanes...));
          const Vec<A> dzx = dz * xhat;
          if (wanted) {
            store(dgamma + i, load(dgamma + i, lanes...) + dzx, lanes...);
            store(dbeta + i, load(dbeta + i, lanes...) + dz, lanes...);
          }
          // Beyond the lanes in use gamma is 0, but 0 * NaN would count.
          const Vec<A> g = dz * scale, gx = dzx * scale;
          if constexpr (sizeof...(lanes) == 1) {
            g_sums[which] += keep<A>(g, lanes...);
            gx_sums[which] += keep<A>(gx, lanes...);
          } else {
            g_sums[which] += g;
            gx_sums[which] += gx;
          }
        };
        for (; i + 2 * L <= to; i += L) {
          add(0);
          i += L;
          add(1);
        }
        for (; i + L <= to; i += L) add(0);
        if (i < to) add(1, int(to - i));
        g_total += double(sum<A>(g_sums[0] + g_sums[1]));
        gx_total += double(sum<A>(gx_sums[0] + gx_sums[1]));
      }
    });
    scratch.g[size_t(piece)] = g_total;
    scratch.gx[size_t(piece)] = gx_total;
  }

  void gather_stretches(int64_t unit, int64_t piece, Scratch& scratch) const {
    const int64_t channel = sets.channel(unit);
    const T *x = tensors.x, *dy = tensors.dy;
    double g_total = 0, gx_total = 0;
    sets.for_runs(unit, piece, [&](int64_t start, int64_t begin, int64_t end) {
      sets.for_stretches(start, begin, end, [&](int64_t member, int64_t from, int64_t to) {
        const A gamma = parameters.gamma[channel + member],
                beta = parameters.beta[channel + member];
        double dz_total = 0, dzx_total = 0;
        for (int64_t block = from; block < to; block += kBlockElements) {
          const int64_t stop = std::min(to, block + kBlockElements);
          Vec<A> dz_sums[4] = {}, dzx_sums[4] = {};
          int64_t i = block;
          const auto add = [&](int which, int64_t at, auto... lanes) {
            const Vec<A> xhat = (load(x + at, lanes...) - scratch.mean) * scratch.inv_std;
            Vec<A> dz = gradient(load(dy + at, lanes...), xhat, gamma, beta);
            Vec<A> dzx = dz * xhat;
            if constexpr (sizeof...(lanes) == 1) {
              dz = keep<A>(dz, lanes...);
              dzx = keep<A>(dzx, lanes...);
            }
            dz_sums[which] += dz;
            dzx_sums[which] += dzx;
          };
          for (; i + 4 * L <= stop; i += 4 * L) {
            for (int v = 0; v < 4; ++v) add(v, i + v * L);
          }
          for (; i + L <= stop; i += L) add(0, i);
          if (i < stop) add(1, i, int(stop - i));
          dz_total += double(sum<A>((dz_sums[0] + dz_sums[1]) + (dz_sums[2] + dz_sums[3])));
          dzx_total += double(sum<A>((dzx_sums[0] + dzx_sums[1]) + (dzx_sums[2] + dzx_sums[3])));
        }
        scratch.dz[size_t(piece * sets.members + member)] += dz_total;
        scratch.dzx[size_t(piece * sets.members + member)] += dzx_total;
        g_total += double(gamma) * dz_total;
        gx_total += double(gamma) * dzx_total;
      });
    });
    scratch.g[size_t(piece)] = g_total;
    scratch.gx[size_t(piece)] = gx_total;
  }

  void settle(int64_t unit, int64_t chunk, Scratch& scratch) const {
    double g = 0, gx = 0;
    for (int64_t piece = 0; piece < split.pieces; ++piece) {
      g += scratch.g[size_t(piece)];
      gx += scratch.gx[size_t(piece)];
    }
    const double factor = double(scratch.inv_std) / double(sets.elements());
    scratch.offset = tensors.norm.centred ? A(factor * g) : A(0);
    scratch.pull = A(factor * gx);
    if (sets.gamma_per_element || !accumulators.wanted()) return;
    A* dgamma = accumulators.dgamma(chunk) + sets.channel(unit);
    A* dbeta = accumulators.dbeta(chunk) + sets.channel(unit);
    for (int64_t piece = 0; piece < split.pieces; ++piece) {
      for (int64_t member = 0; member < sets.members; ++member) {
        dgamma[member] += A(scratch.dzx[size_t(piece * sets.members + member)]);
        dbeta[member] += A(scratch.dz[size_t(piece * sets.members + member)]);
      }
    }
  }

  void apply(int64_t unit, int64_t piece, const Scratch& scratch) const {
    const int64_t channel = sets.channel(unit);
    const T *x = tensors.x, *dy = tensors.dy;
    T* dx = tensors.dx;
    const auto result = [&](Vec<A> x_lanes, Vec<A> dy_lanes, auto gamma, auto beta) {
      const Vec<A> xhat = (x_lanes - scratch.mean) * scratch.inv_std;
      const Vec<A> g = gradient(dy_lanes, xhat, gamma, beta) * gamma;
      return g * scratch.inv_std - (scratch.offset + xhat * scratch.pull);
    };
    sets.for_runs(unit, piece, [&](int64_t start, int64_t begin, int64_t end) {
      if (sets.gamma_per_element) {
        const A *gamma = parameters.gamma + channel - start,
                *beta = parameters.beta + channel - start;
        for_vectors<A>(
            begin, end,
            [&](int64_t i) {
              store(dx + i, result(load(x + i), load(dy + i), load(gamma + i), load(beta + i)));
            },
            [&](int64_t i, int lanes) {
              store(dx + i,
                    result(load(x + i, lanes), load(dy + i, lanes), load(gamma + i, lanes),
                           load(beta + i, lanes)),
                    lanes);
            });
        return;
      }
      sets.for_stretches(start, begin, end, [&](int64_t member, int64_t from, int64_t to) {
        const A gamma = parameters.gamma[channel + member],
                beta = parameters.beta[channel + member];
        for_vectors<A>(
            from, to,
            [&](int64_t i) { store(dx + i, result(load(x + i), load(dy + i), gamma, beta)); },
            [&](int64_t i, int lanes) {
              store(dx + i, result(load(x + i, lanes), load(dy + i, lanes), gamma, beta), lanes);
            });
      });
    });
  }

  void reduce(int threads) const { accumulators.reduce(tensors.dgamma, tensors.dbeta, threads); }
};

}  // namespace rows

void run_rows(const Call& call, int threads) {
  if (are_short_rows(call.norm)) return run_short_rows(call, threads);
  run_family<rows::Forward, rows::Backward>(call, threads);
}

}  // namespace normwise::NORMWISE_ISA
