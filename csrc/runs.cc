// Norms whose sets are long runs of memory: group and instance norm channels first or in the
// middle, layer and RMS norm over very many elements.
//
// A unit is one set: `before` runs of members * after elements that lie side by side in memory. A
// piece is a part of its run where it has only one. Where after is 1 each element of a run has a
// gamma of its own; else the run falls into stretches of `after` elements, and each of these has.
#include "kernel.h"

namespace normwise::NORMWISE_ISA {
namespace runs {

// The elements of a piece.
constexpr int64_t kPieceElements = 1 << 16;
// So many neighbouring packs have sums of their own, so that no addition waits for the one before.
// They are neighbours, since a block that is read in several places at once takes longer.
template <class T>
constexpr int kSums = 4 / kVectors<T>;
// The elements of a block: 128 for each lane of the sums.
template <class T>
constexpr int64_t kBlockElements = 128 * kSums<T> * kPack<T>;

// Two sums over the elements of a block: f(i, first, second, lanes...) adds to both of them what
// the pack at i gives.
template <class T, class F>
NORMWISE_INLINE std::array<double, 2> block_sums(int64_t elements, const F& f) {
  constexpr int kCount = kSums<T>;
  Pack<T> first[kCount] = {}, second[kCount] = {};
  int64_t i = 0;
  for (; i + kCount * kPack<T> <= elements; i += kCount * kPack<T>) {
    for (int k = 0; k < kCount; ++k) f(i + k * kPack<T>, first[k], second[k]);
  }
  for_packs<T>(i, elements,
               [&](int64_t at, auto... lanes) { f(at, first[0], second[0], lanes...); });
  const auto total = [](const Pack<T>(&sums)[kCount]) {
    Pack<T> all = sums[0] + sums[1];
    if constexpr (kCount == 4) all += sums[2] + sums[3];
    return double(sum<ArithmeticOf<T>>(together(all)));
  };
  return {total(first), total(second)};
}

// Calls f(begin, end) for the blocks between two offsets.
template <class T, class F>
inline void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kBlockElements<T>)
    f(begin, std::min(end, begin + kBlockElements<T>));
}

// Adds the elements of a run to the moments, block by block, each read once. What is summed up are
// the deviations from the mean of the blocks before, and in the first block from that of its first
// few elements.
template <class T>
void add_run(const T* x, int64_t elements, bool subtract_mean, Moments& moments) {
  using A = ArithmeticOf<T>;
  for_blocks<T>(0, elements, [&](int64_t begin, int64_t end) {
    const T* block = x + begin;
    A centre = 0;
    if (subtract_mean && moments.count > 0) {
      centre = A(moments.mean);
    } else if (subtract_mean) {
      const int64_t few = enough_for_centre(end - begin);
      const A first = first_of(block);
      const auto sums = block_sums<T>(few, [&](int64_t i, Pack<T>& sum, Pack<T>&, auto... lanes) {
        sum += keep(load(block + i, lanes...) - first, lanes...);
      });
      centre = A(double(first) + sums[0] / double(few));
    }
    const auto [sum, square] =
        block_sums<T>(end - begin, [&](int64_t i, Pack<T>& sums, Pack<T>& squares, auto... lanes) {
          const Pack<T> d = keep(load(block + i, lanes...) - centre, lanes...);
          sums += d;
          squares += d * d;
        });
    moments.add(double(end - begin), subtract_mean, double(centre), sum, square);
  });
}

// How the sets lie in memory, and which gammas their elements have.
struct Sets {
  int64_t samples, outer_per_sample, groups, before, members, after, run, pieces;
  bool gamma_per_element;

  explicit Sets(const Norm& norm)
      : samples(norm.samples),
        outer_per_sample(norm.outer / norm.samples),
        groups(norm.groups),
        before(norm.before),
        members(norm.members),
        after(norm.after),
        run(norm.members * norm.after),
        pieces(before == 1 ? std::max<int64_t>(1, (run + kPieceElements - 1) / kPieceElements) : 1),
        gamma_per_element(norm.after == 1) {}

  int64_t elements() const { return before * run; }
  int64_t outer(int64_t unit) const { return unit / groups; }
  int64_t group(int64_t unit) const { return unit % groups; }
  int64_t channel(int64_t unit) const { return group(unit) * members; }
  // The group of a unit among those of all samples, and where its gammas begin.
  int64_t parameters(int64_t unit) const {
    return samples == 1 ? group(unit) : outer(unit) / outer_per_sample * groups + group(unit);
  }
  int64_t parameter(int64_t unit) const { return parameters(unit) * members; }
  // Where the mean of a unit is in the statistics; 1 / standard deviation comes `groups` later.
  int64_t statistics(int64_t unit) const { return outer(unit) * 2 * groups + group(unit); }

  Split split() const {
    const int64_t units = outer_per_sample * groups;
    const int64_t fewest = kElementsPerThread / elements();
    const int64_t per_chunk = std::max({int64_t(1), (units + 63) / 64, fewest});
    // With a gamma for each element a chunk's sums are as many as two units have elements.
    return {samples, units, pieces, elements(),
            gamma_per_element ? std::max<int64_t>(4, per_chunk) : per_chunk};
  }

  // Calls f(start, begin, end) for each run of a piece: the offset in x where the run starts, and
  // those between which it lies in the piece.
  template <class F>
  void for_runs(int64_t unit, int64_t piece, const F& f) const {
    for (int64_t index = 0; index < before; ++index) {
      const int64_t start = ((outer(unit) * before + index) * groups + group(unit)) * run;
      f(start, start + piece * kPieceElements,
        pieces == 1 ? start + run : std::min(start + run, start + (piece + 1) * kPieceElements));
    }
  }

  // Calls f(member, begin, end) for each stretch between two offsets of the run that starts at
  // `start`.
  template <class F>
  void for_stretches(int64_t start, int64_t begin, int64_t end, const F& f) const {
    for (int64_t member = (begin - start) / after; begin < end; ++member) {
      const int64_t stop = std::min(end, start + (member + 1) * after);
      f(member, begin, stop);
      begin = stop;
    }
  }
};

template <class T, Kind kind>
struct Forward {
  using A = ArithmeticOf<T>;

  Tensors<T> tensors;
  Sets sets;
  Split split;
  Parameters<T> parameters;  // where each element has its own

  explicit Forward(const Call& call)
      : tensors(call),
        sets(call.norm),
        split(sets.split()),
        parameters(tensors, sets.gamma_per_element ? sets.samples * sets.groups : 0, sets.members) {
  }

  struct Scratch {
    std::vector<Moments> moments;       // piece by piece
    A mean = 0, inv_std = 0, rest = 0;  // xhat = (x - mean) * inv_std + rest

    explicit Scratch(const Forward& job) : moments(size_t(job.split.pieces)) {}
  };

  void prepare(int64_t, Scratch&) const {}

  void gather(int64_t unit, int64_t piece, int64_t, Scratch& scratch) const {
    Moments moments;
    sets.for_runs(unit, piece, [&](int64_t, int64_t begin, int64_t end) {
      tensors.add(begin, end);
      add_run(tensors.x + begin, end - begin, tensors.norm.subtract_mean, moments);
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
    const A mean = scratch.mean, inv_std = scratch.inv_std, rest = scratch.rest;
    const A slope = tensors.slope;
    const int code = tensors.norm.activation;
    sets.for_runs(unit, piece, [&](int64_t start, int64_t begin, int64_t end) {
      if (sets.gamma_per_element) {
        const int64_t first = sets.parameters(unit) * padded<T>(sets.members) - start;
        const A *gamma = parameters.gamma.data() + first, *beta = parameters.beta.data() + first;
        for_packs<T>(begin, end, [&](int64_t i, auto... lanes) {
          const Pack<T> xhat = (load(x + i, lanes...) - mean) * inv_std + rest;
          const Pack<T> z = xhat * read<T>(gamma + i) + read<T>(beta + i);
          store(y + i, activate<kind>(z, code, slope), lanes...);
        });
        return;
      }
      sets.for_stretches(start, begin, end, [&](int64_t member, int64_t from, int64_t to) {
        const int64_t parameter = sets.parameter(unit) + member;
        const A scale = inv_std * tensors.gamma_at(parameter);
        const A shift = rest * tensors.gamma_at(parameter) + tensors.beta_at(parameter);
        for_packs<T>(from, to, [&](int64_t i, auto... lanes) {
          const Pack<T> z = (load(x + i, lanes...) - mean) * scale + shift;
          store(y + i, activate<kind>(z, code, slope), lanes...);
        });
      });
    });
  }
};

template <class T, Kind kind>
struct Backward {
  using A = ArithmeticOf<T>;

  Tensors<T> tensors;
  Sets sets;
  Split split;
  Parameters<T> parameters;      // where each element has its own
  Accumulators<A> accumulators;  // in the order of the parameters

  explicit Backward(const Call& call)
      : tensors(call),
        sets(call.norm),
        split(sets.split()),
        parameters(tensors, sets.gamma_per_element ? sets.samples * sets.groups : 0, sets.members),
        accumulators(split, sets.groups * width(), call) {}

  // How many sums a group has.
  int64_t width() const { return sets.gamma_per_element ? padded<T>(sets.members) : sets.members; }

  struct Scratch {
    // Sums of g = gamma * dz and of g * xhat over the set, piece by piece.
    std::vector<double> g, gx;
    // Where a gamma has a stretch: sums of dz and of dz * xhat, member by member of a piece.
    std::vector<double> dz, dzx;
    // dx = g * inv_std - (offset + (x - mean) * pull).
    A mean = 0, inv_std = 0, offset = 0, pull = 0;

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
    for (auto* sums : {&scratch.g, &scratch.gx, &scratch.dz, &scratch.dzx}) {
      std::fill(sums->begin(), sums->end(), 0.0);
    }
  }

  // dz, the gradient with respect to what the activation was given. A parameter is a pack or one
  // number for all.
  template <class P>
  Pack<T> gradient(Pack<T> dy, Pack<T> xhat, P gamma, P beta) const {
    if constexpr (kind == Kind::kIdentity) return dy;
    return deactivate<kind>(dy, xhat * gamma + beta, tensors.norm.activation, tensors.slope);
  }

  void gather(int64_t unit, int64_t piece, int64_t chunk, Scratch& scratch) const {
    sets.for_runs(unit, piece, [&](int64_t start, int64_t begin, int64_t end) {
      if (sets.gamma_per_element) {
        gather_elements(unit, piece, chunk, start, begin, end, scratch);
        return;
      }
      sets.for_stretches(start, begin, end, [&](int64_t member, int64_t from, int64_t to) {
        gather_stretch(unit, piece, member, from, to, scratch);
      });
    });
  }

  void gather_elements(int64_t unit, int64_t piece, int64_t chunk, int64_t start, int64_t begin,
                       int64_t end, Scratch& scratch) const {
    const int64_t first = sets.parameters(unit) * width() - start;
    const A *gammas = parameters.gamma.data() + first, *betas = parameters.beta.data() + first;
    const bool wanted = accumulators.wanted();
    const int64_t first_sum = sets.group(unit) * width() - start;
    A* dgamma = wanted ? accumulators.dgamma(chunk) + first_sum : nullptr;
    A* dbeta = wanted ? accumulators.dbeta(chunk) + first_sum : nullptr;
    const T *x = tensors.x, *dy = tensors.dy;
    const A mean = scratch.mean, inv_std = scratch.inv_std;
    double g_total = 0, gx_total = 0;
    for_blocks<T>(begin, end, [&](int64_t from, int64_t to) {
      const auto [g, gx] = block_sums<T>(
          to - from, [&](int64_t offset, Pack<T>& g_sum, Pack<T>& gx_sum, auto... lanes) {
            const int64_t i = from + offset;
            const Pack<T> xhat = (load(x + i, lanes...) - mean) * inv_std;
            const Pack<T> gamma = read<T>(gammas + i);
            const Pack<T> dz = gradient(load(dy + i, lanes...), xhat, gamma, read<T>(betas + i));
            if (wanted) {
              write<T>(dgamma + i, read<T>(dgamma + i) + dz * xhat);
              write<T>(dbeta + i, read<T>(dbeta + i) + dz);
            }
            g_sum += keep(dz * gamma, lanes...);
            gx_sum += keep(dz * gamma * xhat, lanes...);
          });
      g_total += g;
      gx_total += gx;
    });
    scratch.g[size_t(piece)] += g_total;
    scratch.gx[size_t(piece)] += gx_total;
  }

  void gather_stretch(int64_t unit, int64_t piece, int64_t member, int64_t begin, int64_t end,
                      Scratch& scratch) const {
    const A gamma = tensors.gamma_at(sets.parameter(unit) + member);
    const A beta = tensors.beta_at(sets.parameter(unit) + member);
    const T *x = tensors.x, *dy = tensors.dy;
    const A mean = scratch.mean, inv_std = scratch.inv_std;
    double dz_total = 0, dzx_total = 0;
    for_blocks<T>(begin, end, [&](int64_t from, int64_t to) {
      const auto [dz_sum, dzx_sum] = block_sums<T>(
          to - from, [&](int64_t offset, Pack<T>& sums, Pack<T>& sums_x, auto... lanes) {
            const int64_t i = from + offset;
            const Pack<T> xhat = (load(x + i, lanes...) - mean) * inv_std;
            const Pack<T> dz = gradient(load(dy + i, lanes...), xhat, gamma, beta);
            sums += keep(dz, lanes...);
            sums_x += keep(dz * xhat, lanes...);
          });
      dz_total += dz_sum;
      dzx_total += dzx_sum;
    });
    scratch.dz[size_t(piece * sets.members + member)] += dz_total;
    scratch.dzx[size_t(piece * sets.members + member)] += dzx_total;
    scratch.g[size_t(piece)] += double(gamma) * dz_total;
    scratch.gx[size_t(piece)] += double(gamma) * dzx_total;
  }

  void settle(int64_t unit, int64_t chunk, Scratch& scratch) const {
    double g = 0, gx = 0;
    for (int64_t piece = 0; piece < split.pieces; ++piece) {
      g += scratch.g[size_t(piece)];
      gx += scratch.gx[size_t(piece)];
    }
    const double factor = double(scratch.inv_std) / double(sets.elements());
    scratch.offset = tensors.norm.subtract_mean ? A(factor * g) : A(0);
    scratch.pull = A(factor * double(scratch.inv_std) * gx);
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
    const T *x = tensors.x, *dy = tensors.dy;
    const A mean = scratch.mean, inv_std = scratch.inv_std;
    const A offset = scratch.offset, pull = scratch.pull;
    const Gradient<T> dx = tensors.dx;
    const auto write_pack = [=](int64_t i, auto gamma, auto beta, auto... lanes) {
      const Pack<T> deviation = load(x + i, lanes...) - mean;
      const Pack<T> dz = gradient(load(dy + i, lanes...), deviation * inv_std, gamma, beta);
      dx.put(i, dz * gamma * inv_std - (deviation * pull + offset), lanes...);
    };
    sets.for_runs(unit, piece, [&](int64_t start, int64_t begin, int64_t end) {
      if (sets.gamma_per_element) {
        const int64_t first = sets.parameters(unit) * width() - start;
        const A *gamma = parameters.gamma.data() + first, *beta = parameters.beta.data() + first;
        for_packs<T>(begin, end, [&](int64_t i, auto... lanes) {
          write_pack(i, read<T>(gamma + i), read<T>(beta + i), lanes...);
        });
        return;
      }
      sets.for_stretches(start, begin, end, [&](int64_t member, int64_t from, int64_t to) {
        const A gamma = tensors.gamma_at(sets.parameter(unit) + member);
        const A beta = tensors.beta_at(sets.parameter(unit) + member);
        for_packs<T>(from, to,
                     [&](int64_t i, auto... lanes) { write_pack(i, gamma, beta, lanes...); });
      });
    });
  }

  void reduce(int threads) const {
    if (!sets.gamma_per_element) {
      accumulators.reduce(tensors.dgamma, tensors.dbeta, threads);
      return;
    }
    std::vector<A> dgamma(parameters.gamma.size()), dbeta(dgamma.size());
    accumulators.reduce(dgamma.data(), dbeta.data(), threads);
    const int64_t groups = sets.samples * sets.groups;
    Parameters<T>::restore(dgamma, tensors.dgamma, groups, sets.members);
    Parameters<T>::restore(dbeta, tensors.dbeta, groups, sets.members);
  }
};

}  // namespace runs

void run_runs(const Call& call, int threads) {
  run_family<runs::Forward, runs::Backward>(call, threads);
}

}  // namespace normwise::NORMWISE_ISA
