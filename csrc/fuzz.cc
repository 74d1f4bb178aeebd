// Holds the kernels against a plain float64 reference over random geometries, dtypes and options.
//
//     fuzz [SECONDS [SEED]]
//
// Every array is allocated to its exact length, so that an address sanitizer sees each element read
// or written too many. A failure prints the case and ends the program with status 1.
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "call.h"
#include "normwise.h"
#include "parallel.h"

namespace {

using normwise::Norm;

using std::vector;

double to_double(const void* p, int dtype, int64_t i) {
  switch (dtype) {
    case NORMWISE_FLOAT32:
      return static_cast<const float*>(p)[i];
    case NORMWISE_FLOAT64:
      return static_cast<const double*>(p)[i];
    case NORMWISE_FLOAT16: {
      const uint16_t bits = static_cast<const uint16_t*>(p)[i];
      const int exponent = bits >> 10 & 31, fraction = bits & 1023;
      double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                    : std::ldexp(fraction, -24);
      return bits & 0x8000 ? -value : value;
    }
    default: {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
  }
}

// A number that the dtype can represent, near `value`.
void put(void* p, int dtype, int64_t i, double value) {
  switch (dtype) {
    case NORMWISE_FLOAT32:
      static_cast<float*>(p)[i] = float(value);
      return;
    case NORMWISE_FLOAT64:
      static_cast<double*>(p)[i] = value;
      return;
    case NORMWISE_FLOAT16: {
      uint16_t bits = std::signbit(value) ? 0x8000 : 0;
      double magnitude = std::fabs(value);
      if (std::isnan(value))
        bits |= 0x7e00;
      else if (magnitude >= 65520)
        bits |= 0x7c00;
      else if (magnitude > 0) {
        int exponent = std::max(-14, std::ilogb(magnitude));
        const int fraction = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
        bits = uint16_t(bits | ((exponent + 14) * 1024 + fraction));
      }
      static_cast<uint16_t*>(p)[i] = bits;
      return;
    }
    default: {
      const float rounded = float(value);
      uint32_t bits;
      std::memcpy(&bits, &rounded, sizeof bits);
      static_cast<uint16_t*>(p)[i] = uint16_t(bits >> 16);
      return;
    }
  }
}

int64_t bytes_of(int dtype) {
  return dtype == NORMWISE_FLOAT64 ? 8 : dtype == NORMWISE_FLOAT32 ? 4 : 2;
}
double epsilon_of(int dtype) {
  return std::ldexp(1, dtype == NORMWISE_FLOAT64   ? -53
                       : dtype == NORMWISE_FLOAT32 ? -24
                       : dtype == NORMWISE_FLOAT16 ? -11
                                                   : -8);
}

// An array of exactly as many elements as it is said to have.
class Array {
 public:
  Array(int dtype, int64_t size)
      : dtype(dtype), size(size), bytes(size_t(size) * size_t(bytes_of(dtype))) {
    memory_ = std::malloc(bytes > 0 ? bytes : 1);
    std::memset(memory_, 0x7b, bytes);
  }
  Array(const Array& other) : Array(other.dtype, other.size) {
    std::memcpy(memory_, other.memory_, bytes);
  }
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(memory_); }

  double operator[](int64_t i) const { return to_double(memory_, dtype, i); }
  void set(int64_t i, double value) { put(memory_, dtype, i, value); }
  void* data() { return memory_; }
  bool same(const Array& other) const { return std::memcmp(memory_, other.memory_, bytes) == 0; }

  const int dtype;
  const int64_t size;
  const size_t bytes;

 private:
  void* memory_;
};

double activate(const Norm& norm, double z, double* derivative) {
  const double s = 1 / (1 + std::exp(-z)), k = std::sqrt(2 / M_PI);
  switch (norm.activation) {
    case NORMWISE_LEAKY_RELU:
      *derivative = z > 0 ? 1 : norm.slope;
      return z > 0 ? z : norm.slope * z;
    case NORMWISE_SIGMOID:
      *derivative = s * (1 - s);
      return s;
    case NORMWISE_TANH:
      *derivative = 1 - std::tanh(z) * std::tanh(z);
      return std::tanh(z);
    case NORMWISE_SILU:
      *derivative = s * (1 + z * (1 - s));
      return z * s;
    case NORMWISE_GELU: {
      const double cumulative = 0.5 * std::erfc(-z / std::sqrt(2));
      *derivative = cumulative + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
      return z * cumulative;
    }
    case NORMWISE_GELU_TANH: {
      const double t = std::tanh(k * (z + 0.044715 * z * z * z));
      *derivative = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z);
      return 0.5 * z * (1 + t);
    }
    default:
      *derivative = 1;
      return z;
  }
}

struct Case {
  Norm norm;
  int32_t threads;
  bool has_gamma, has_beta, per_sample, has_residual, has_dsum;
  double mean, spread;
  uint64_t seed;

  int64_t kept() const { return norm.keeps_after ? norm.after : norm.groups; }
  int64_t size() const { return norm.elements(); }
  int64_t set_size() const {
    return norm.keeps_after ? norm.members : norm.before * norm.members * norm.after;
  }
  int64_t channels() const { return norm.channels(); }
  int64_t channel(int64_t i) const { return i / norm.after % channels(); }
  int64_t parameter(int64_t i) const {
    return i / (size() / norm.samples) * channels() + channel(i);
  }
  int64_t set(int64_t i) const {
    const int64_t outer = i / (size() / norm.outer);
    return outer * kept() + (norm.keeps_after ? i % norm.after : channel(i) / norm.members);
  }
};

struct Result {
  Array y, statistics, sum, dx, dgamma, dbeta;

  explicit Result(const Case& c)
      : y(c.norm.dtype, c.size()),
        statistics(c.norm.dtype == NORMWISE_FLOAT64, c.norm.outer * 2 * c.kept()),
        sum(c.norm.dtype, c.size()),
        dx(c.norm.dtype, c.size()),
        dgamma(c.norm.dtype == NORMWISE_FLOAT64, c.norm.parameters()),
        dbeta(c.norm.dtype == NORMWISE_FLOAT64, c.norm.parameters()) {}

  bool same(const Result& other) const {
    return y.same(other.y) && statistics.same(other.statistics) && sum.same(other.sum) &&
           dx.same(other.dx) && dgamma.same(other.dgamma) && dbeta.same(other.dbeta);
  }
};

struct Inputs {
  Array x, dy, gamma, beta, residual, dsum;

  explicit Inputs(const Case& c)
      : x(c.norm.dtype, c.size()),
        dy(c.norm.dtype, c.size()),
        gamma(c.norm.dtype == NORMWISE_FLOAT64, c.norm.parameters()),
        beta(c.norm.dtype == NORMWISE_FLOAT64, c.norm.parameters()),
        residual(c.norm.dtype, c.size()),
        dsum(c.norm.dtype, c.size()) {
    std::mt19937_64 random(c.seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < c.size(); ++i) x.set(i, c.mean + c.spread * normal(random));
    for (int64_t i = 0; i < c.size(); ++i) dy.set(i, normal(random));
    for (int64_t i = 0; i < gamma.size; ++i) gamma.set(i, normal(random));
    for (int64_t i = 0; i < beta.size; ++i) beta.set(i, normal(random));
    for (int64_t i = 0; i < c.size(); ++i) residual.set(i, normal(random));
    for (int64_t i = 0; i < c.size(); ++i) dsum.set(i, normal(random));
  }
};

void calculate(const Case& c, Inputs& in, Result& out) {
  void *gamma = c.has_gamma ? in.gamma.data() : nullptr,
       *beta = c.has_beta ? in.beta.data() : nullptr;
  const Norm& n = c.norm;
  // Keeping after, a norm has no before, and not even axes of it.
  const bool kept = n.keeps_after;
  const int64_t per_sample = n.outer / n.samples;
  const int64_t with_before[] = {n.samples, per_sample, n.before, n.channels(), n.after};
  const int64_t without_before[] = {n.samples, per_sample, n.channels(), n.after};
  NormwiseNorm norm = {};
  norm.size = sizeof norm;
  norm.outer_end = 2;
  norm.before_end = kept ? 2 : 3;
  norm.channels_end = kept ? 3 : 4;
  norm.per_sample = c.per_sample;
  norm.keeps_after = kept;
  norm.groups = n.groups;
  norm.subtract_mean = n.subtract_mean;
  norm.activation = n.activation;
  norm.epsilon = n.epsilon;
  norm.slope = n.slope;
  NormwiseOperands operands = {};
  operands.size = sizeof operands;
  operands.extents = kept ? without_before : with_before;
  operands.rank = kept ? 4 : 5;
  operands.dtype = n.dtype;
  operands.threads = c.threads;
  operands.x = in.x.data();
  operands.gamma = gamma;
  operands.beta = beta;
  operands.y = out.y.data();
  operands.statistics = out.statistics.data();
  operands.residual = c.has_residual ? in.residual.data() : nullptr;
  operands.sum = c.has_residual ? out.sum.data() : nullptr;
  const int32_t forward = normwise_forward(&norm, &operands);
  if (c.has_residual) operands.x = out.sum.data();
  operands.dsum = c.has_dsum ? in.dsum.data() : nullptr;
  operands.dy = in.dy.data();
  operands.dx = out.dx.data();
  operands.dgamma = out.dgamma.data();
  operands.dbeta = out.dbeta.data();
  if (forward != NORMWISE_OK || normwise_backward(&norm, &operands) != NORMWISE_OK) {
    std::printf("a call failed: %s\n", normwise_message());
    std::exit(1);
  }
}

[[noreturn]] void fail(const Case& c, const char* what, int64_t index, double got, double expected,
                       double tolerance) {
  const Norm& n = c.norm;
  std::printf(
      "FAILED %s[%lld]: %.9g, expected %.9g +- %.3g\n"
      "  shape (%lld, %lld, %lld, %lld, %lld) keeps_after %d subtract_mean %d dtype %d activation "
      "%d\n"
      "  epsilon %g slope %g threads %d gamma %d beta %d samples %lld of their own %d residual %d "
      "dsum %d mean %g spread %g seed %llu on %s\n",
      what, static_cast<long long>(index), got, expected, tolerance,
      static_cast<long long>(n.outer), static_cast<long long>(n.before),
      static_cast<long long>(n.groups), static_cast<long long>(n.members),
      static_cast<long long>(n.after), n.keeps_after, n.subtract_mean, n.dtype, n.activation,
      n.epsilon, n.slope, c.threads, c.has_gamma, c.has_beta, static_cast<long long>(n.samples),
      c.per_sample, c.has_residual, c.has_dsum, c.mean, c.spread,
      static_cast<unsigned long long>(c.seed), normwise_instructions());
  std::exit(1);
}

void expect(const Case& c, const char* what, int64_t index, double got, double expected,
            double tolerance) {
  if (!(std::fabs(got - expected) <= tolerance)) fail(c, what, index, got, expected, tolerance);
}

void check(const Case& c) {
  Inputs in(c);
  Result out(c);
  calculate(c, in, out);

  const Norm& norm = c.norm;
  const int64_t sets = norm.outer * c.kept(), parameters = norm.parameters();
  const double count = double(std::max<int64_t>(1, c.set_size()));
  const auto gamma = [&](int64_t i) { return c.has_gamma ? in.gamma[c.parameter(i)] : 1; };
  const auto beta = [&](int64_t i) { return c.has_beta ? in.beta[c.parameter(i)] : 0; };

  // The sum is rounded once, and is what is normalized then.
  for (int64_t i = 0; c.has_residual && i < c.size(); ++i) {
    const double sum = in.x[i] + in.residual[i], tiny = norm.dtype == NORMWISE_FLOAT16 ? 3e-8 : 0;
    expect(c, "sum", i, out.sum[i], sum, 1.01 * epsilon_of(norm.dtype) * std::fabs(sum) + tiny);
  }
  const Array& x = c.has_residual ? out.sum : in.x;

  // Sums in extended precision: those of the kernels in float64 are to be judged by them.
  vector<long double> mean(size_t(sets), 0.0L), inv_std(size_t(sets), 0.0L);
  if (norm.subtract_mean) {
    for (int64_t i = 0; i < c.size(); ++i) mean[size_t(c.set(i))] += (long double)(x[i]) / count;
  }
  for (int64_t i = 0; i < c.size(); ++i) {
    const long double d = x[i] - mean[size_t(c.set(i))];
    inv_std[size_t(c.set(i))] += d * d / count;
  }
  for (long double& v : inv_std) v = v + norm.epsilon == 0 ? 0 : 1 / std::sqrt(v + norm.epsilon);

  // The error of xhat: some roundings of x - mean, of the standard deviation, and of the mean.
  const double eps = norm.dtype == NORMWISE_FLOAT64 ? std::ldexp(1, -53) : std::ldexp(1, -24);
  const double eps_out = epsilon_of(norm.dtype);
  // Moments are merged in float64: without a rounding for float32, with one per merge for float64.
  const double mean_roundings = norm.dtype == NORMWISE_FLOAT64 ? 16 : 3;
  const double own_roundings = norm.dtype == NORMWISE_FLOAT64 ? 16 : 6;
  vector<long double> g_sum(size_t(sets), 0.0L), gx_sum(size_t(sets), 0.0L),
      doubt(size_t(sets), 0.0L);
  vector<long double> dgamma(size_t(parameters), 0.0L), dbeta(size_t(parameters), 0.0L);
  vector<long double> dgamma_doubt(size_t(parameters), 0.0L), dbeta_doubt(size_t(parameters), 0.0L);
  const double libm = norm.dtype == NORMWISE_FLOAT64 ? 1e-15 : 3e-7;
  for (int64_t i = 0; i < c.size(); ++i) {
    const size_t s = size_t(c.set(i)), k = size_t(c.parameter(i));
    const double xhat = (x[i] - mean[s]) * inv_std[s], z = xhat * gamma(i) + beta(i);
    const double error = eps * (own_roundings * (1 + std::fabs(xhat)) +
                                mean_roundings * std::fabs(mean[s]) * inv_std[s]);
    const double z_error =
        error * std::fabs(gamma(i)) + eps * std::fabs(beta(i)) + 2 * eps * std::fabs(z);
    double slope;
    const double y = activate(norm, z, &slope);
    const double tiny = norm.dtype == NORMWISE_FLOAT16 ? 6e-8 : 1e-37;
    const double fit = norm.activation > NORMWISE_LEAKY_RELU ? libm * (1 + std::fabs(z)) : 0;
    expect(c, "y", i, out.y[i], y, 1.2 * z_error + fit + 1.01 * eps_out * std::fabs(y) + tiny);

    const double dz = in.dy[i] * slope;
    // Where relu's z may be on either side of 0, either gradient is right.
    const bool kink = norm.activation == NORMWISE_LEAKY_RELU && std::fabs(z) <= z_error;
    const double dz_error =
        std::fabs(in.dy[i]) *
        (kink ? 1 + std::fabs(norm.slope)
              : (norm.activation > NORMWISE_LEAKY_RELU ? 2 * z_error + 4 * fit : 0) + 2 * eps);
    g_sum[s] += dz * gamma(i);
    gx_sum[s] += dz * gamma(i) * xhat;
    const double roundings = 2 * eps * (2 + std::sqrt(count) / 16);
    doubt[s] += (dz_error + std::fabs(dz) * (roundings + error)) *
                (std::fabs(gamma(i)) * (1 + std::fabs(xhat)));
    dgamma[k] += dz * xhat;
    dbeta[k] += dz;
    dgamma_doubt[k] +=
        dz_error * std::fabs(xhat) + std::fabs(dz) * (error + 8 * eps * std::fabs(xhat));
    dbeta_doubt[k] += dz_error + 8 * eps * std::fabs(dz);
  }
  for (int64_t i = 0; i < c.size(); ++i) {
    const size_t s = size_t(c.set(i));
    const double xhat = (x[i] - mean[s]) * inv_std[s], z = xhat * gamma(i) + beta(i);
    double slope;
    activate(norm, z, &slope);
    const double g = in.dy[i] * slope * gamma(i);
    const double pull = gx_sum[s] / count, offset = norm.subtract_mean ? g_sum[s] / count : 0;
    const double dsum = c.has_dsum ? in.dsum[i] : 0;
    const double dx = inv_std[s] * (g - offset - xhat * pull) + dsum;
    const double error = eps * (own_roundings * (1 + std::fabs(xhat)) +
                                mean_roundings * std::fabs(mean[s]) * inv_std[s]);
    const double z_error =
        error * std::fabs(gamma(i)) + eps * std::fabs(beta(i)) + 2 * eps * std::fabs(z);
    const bool kink = norm.activation == NORMWISE_LEAKY_RELU && std::fabs(z) <= z_error;
    const double own = std::fabs(in.dy[i] * gamma(i)) *
                       (kink ? 1 + std::fabs(norm.slope)
                             : 4 * eps + (norm.activation > NORMWISE_LEAKY_RELU
                                              ? 2 * z_error + 4 * libm * (1 + std::fabs(z))
                                              : 0));
    const double tolerance =
        inv_std[s] * (own + 2 * doubt[s] / count * (1 + std::fabs(xhat)) + error * std::fabs(pull) +
                      8 * eps * (std::fabs(g) + std::fabs(offset) + std::fabs(xhat * pull))) +
        4 * eps * std::fabs(dsum) + 1.01 * eps_out * std::fabs(dx) +
        (norm.dtype == NORMWISE_FLOAT16 ? 6e-8 : 1e-37);
    expect(c, "dx", i, out.dx[i], dx, tolerance);
  }
  for (int64_t k = 0; k < parameters; ++k) {
    expect(c, "dgamma", k, out.dgamma[k], dgamma[size_t(k)], dgamma_doubt[size_t(k)] + 1e-37);
    expect(c, "dbeta", k, out.dbeta[k], dbeta[size_t(k)], dbeta_doubt[size_t(k)] + 1e-37);
  }

  // The number of threads changes nothing, not even a rounding.
  Case alone = c;
  alone.threads = 1;
  Result serial(c);
  calculate(alone, in, serial);
  if (!serial.same(out)) fail(c, "one thread differs", 0, 0, 0, 0);

  // Nor does the batch: the last outer by itself, or the last sample with what is its own.
  const int64_t parts = c.per_sample ? norm.samples : norm.outer;
  if (parts > 1 && c.size() > 0) {
    Case last = c;
    last.norm.outer = norm.outer / parts;
    last.norm.samples = 1;
    Inputs one(last);
    const auto last_of = [](Array& all, const Array& part) {
      return static_cast<char*>(all.data()) + all.bytes - part.bytes;
    };
    const auto take = [&](Array& all, Array& part) {
      std::memcpy(part.data(), last_of(all, part), part.bytes);
    };
    take(in.x, one.x);
    take(in.dy, one.dy);
    take(in.gamma, one.gamma);
    take(in.beta, one.beta);
    take(in.residual, one.residual);
    take(in.dsum, one.dsum);
    Result single(last);
    calculate(last, one, single);
    const auto differs = [&](Array& all, Array& part) {
      return std::memcmp(last_of(all, part), part.data(), part.bytes) != 0;
    };
    if (differs(out.y, single.y) || differs(out.dx, single.dx) ||
        (c.per_sample &&
         (differs(out.dgamma, single.dgamma) || differs(out.dbeta, single.dbeta)))) {
      fail(c, "the batch matters", 0, 0, 0, 0);
    }
  }

  // A NaN or an infinity fills its set with NaN, and no other.
  if (c.size() > 0 && c.set_size() > 0) {
    const int64_t at = int64_t(c.seed % uint64_t(c.size()));
    in.x.set(at, c.seed % 3 == 0 ? INFINITY : NAN);
    Result spoiled(c);
    calculate(c, in, spoiled);
    for (int64_t i = 0; i < c.size(); ++i) {
      if (c.set(i) == c.set(at)) {
        // An infinite x of a norm without a mean has 1 / std = 0, and gives NaN only where it
        // stands.
        const bool spoils = norm.subtract_mean || c.seed % 3 != 0 || i == at;
        const bool relu = norm.activation == NORMWISE_LEAKY_RELU;
        if (spoils && !std::isnan(spoiled.y[i]))
          fail(c, "NaN lost in y", i, spoiled.y[i], NAN, relu);
      } else if (spoiled.y[i] != out.y[i] || spoiled.dx[i] != out.dx[i]) {
        fail(c, "NaN spread", i, spoiled.y[i], out.y[i], 0);
      }
    }
  }

  // Equal elements give beta, however large.
  if (norm.subtract_mean && norm.activation == NORMWISE_IDENTITY && !c.has_residual &&
      norm.dtype == NORMWISE_FLOAT32) {
    for (int64_t i = 0; i < c.size(); ++i) in.x.set(i, 12345.678 + double(c.set(i)));
    Result flat(c);
    calculate(c, in, flat);
    for (int64_t i = 0; i < c.size(); ++i) {
      if (flat.y[i] != (c.has_beta ? in.beta[c.parameter(i)] : 0))
        fail(c, "equal elements", i, flat.y[i], 0, 0);
    }
  }
}

class Source {
 public:
  explicit Source(uint64_t seed) : random_(seed) {}

  int64_t below(int64_t n) { return int64_t(random_() % uint64_t(n)); }

  // Small numbers, and those around the width of a vector.
  int64_t extent(int64_t most) {
    static constexpr int64_t kEdges[] = {1,  2,   3,   4,   5,   7,   8,    9,   10, 15,
                                         16, 17,  31,  32,  33,  47,  48,   49,  63, 64,
                                         65, 127, 128, 129, 257, 676, 1000, 4099};
    int64_t extent;
    do {
      extent = below(12) == 0 ? below(most) : kEdges[below(int64_t(std::size(kEdges)))];
    } while (extent > most);
    return extent;
  }

  Case draw() {
    Case c = {};
    Norm& n = c.norm;
    n.outer = 1 + below(5);
    n.samples = 1;
    n.before = n.groups = n.members = n.after = 1;
    switch (below(6)) {
      case 0:  // group norm, channels last
        n.before = extent(700);
        n.groups = extent(17);
        n.members = extent(17);
        break;
      case 1:  // instance norm, channels last
        n.before = extent(700);
        n.groups = extent(300);
        break;
      case 2:  // group norm, channels first or in the middle
        n.before = below(3) == 0 ? extent(9) : 1;
        n.groups = extent(9);
        n.members = extent(9);
        n.after = extent(700);
        break;
      case 3:  // layer norm over trailing axes
        n.outer = extent(257);
        n.members = extent(700);
        break;
      case 4:  // layer norm over a middle axis
        n.keeps_after = true;
        n.members = extent(300);
        n.after = extent(300);
        break;
      default:  // few long sets, which fall into pieces
        n.outer = 1 + below(2);
        if (below(2) == 0) {
          n.members = 60000 + below(90000);
        } else if (below(2) == 0) {
          n.groups = 1 + below(3);
          n.members = 1 + below(3);
          n.after = 20000 + below(30000);
        } else {
          n.before = 8000 + below(9000);
          n.groups = 1 + below(5);
          n.members = 1 + below(5);
        }
    }
    n.subtract_mean = below(3) != 0;
    n.dtype = int32_t(below(4));
    n.activation = below(2) == 0 ? 0 : int32_t(below(7));
    const double slopes[] = {0, 0.2, 0.01};
    n.slope = slopes[below(3)];
    const double epsilons[] = {1e-3, 1e-5, 0};
    n.epsilon = epsilons[below(3)];
    c.threads = int32_t(below(4));
    c.has_gamma = below(4) != 0;
    c.has_beta = below(4) != 0;
    const bool narrow = n.dtype == NORMWISE_FLOAT16 || n.dtype == NORMWISE_BFLOAT16;
    c.per_sample = below(3) == 0;
    if (c.per_sample) {
      n.samples = n.outer;
      n.outer *= extent(n.outer * n.before > 60 ? 2 : 9);
    }
    c.has_residual = below(3) == 0;
    c.has_dsum = below(3) == 0;
    const double means[] = {0, 1, narrow ? 2.0 : -1e4};
    c.mean = means[below(3)];
    c.spread = below(4) == 0 ? 100 : 1;
    // A set of one element, or of few that round to the same number, has no reference at epsilon 0.
    if (n.epsilon == 0 && (n.subtract_mean || c.set_size() < 2)) n.epsilon = 1e-3;
    c.seed = random_();
    return c;
  }

 private:
  std::mt19937_64 random_;
};

// Several threads call at once; each must get what it gets alone.
void check_concurrency(uint64_t seed) {
  vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([=] {
      Source source(seed + uint64_t(t));
      for (int i = 0; i < 10; ++i) check(source.draw());
    });
  }
  for (auto& thread : threads) thread.join();
}

// A framework's pool as it may behave: it calls a task at once, on a thread of its own that comes
// when it comes, or not at all.
class Pool {
 public:
  ~Pool() {
    for (auto& thread : threads_) thread.join();
  }

  static bool schedule(void* pool, void (*task)(void*), void* data) {
    Pool& self = *static_cast<Pool*>(pool);
    switch (self.turn_++ % 3) {
      case 0:
        self.threads_.emplace_back([=] { task(data); });
        return true;
      case 1:
        task(data);
        return true;
      default:
        return false;
    }
  }

 private:
  int turn_ = 0;
  vector<std::thread> threads_;
};

// A task that throws ends its call, neither the process nor the next call.
void check_failure() {
  for (int64_t failing = 0; failing < 64; ++failing) {
    bool caught = false;
    try {
      normwise::parallel_for(4, 64, [=](int64_t task) {
        if (task == failing) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    std::atomic<int> done{0};
    normwise::parallel_for(4, 64, [&](int64_t) { ++done; });
    if (!caught || done != 64) {
      std::printf("task %d threw: caught %d, the next call did %d tasks of 64\n", int(failing),
                  caught, done.load());
      std::exit(1);
    }
  }
}

// Tasks round as their caller does, on whichever thread.
void check_mode() {
  volatile float one = 1, little = 1e-9f;
  for (const int mode : {FE_UPWARD, FE_TONEAREST}) {
    std::fesetround(mode);
    std::atomic<int> alike{0};
    normwise::parallel_for(4, 64, [&](int64_t) {
      alike += (one + little > 1) == (mode == FE_UPWARD);
      std::this_thread::sleep_for(std::chrono::microseconds(50));  // for the other threads to come
    });
    if (alike != 64) {
      std::printf("%d tasks of 64 round as their caller\n", alike.load());
      std::exit(1);
    }
  }
}

std::atomic<int> regions{0}, late_every{8};

// What GOMP_parallel does, where the other threads come late in one of so many regions.
void parallel(void (*work)(void*), void* context, unsigned threads, unsigned) {
  const bool late = regions++ % late_every == 0;
  vector<std::thread> others;
  for (unsigned other = 1; other < threads; ++other) {
    others.emplace_back([=] {
      if (late) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      work(context);
    });
  }
  work(context);
  for (auto& thread : others) thread.join();
}

void check_openmp(uint64_t seed) {
  normwise::use_openmp(reinterpret_cast<void*>(parallel));
  Source source(seed);
  for (int i = 0; i < 40; ++i) check(source.draw());
  check_failure();
  check_mode();
  // Threads that are always late are seldom waited for. The longest pause is half as many jobs.
  late_every = 1;
  regions = 0;
  for (int i = 0; i < 2000; ++i) normwise::parallel_for(2, 2, [](int64_t) {});
  if (regions == 0 || regions > 20) {
    std::printf("2000 jobs waited %d times for late threads\n", regions.load());
    std::exit(1);
  }
  normwise::use_openmp(nullptr);
}

void check_loan(uint64_t seed) {
  Source source(seed);
  Pool pool;
  const normwise::Loan loan(Pool::schedule, &pool);
  for (int i = 0; i < 40; ++i) check(source.draw());
  check_failure();
  check_mode();
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device()();
  std::printf("seed %llu, %s, %d threads\n", static_cast<unsigned long long>(seed),
              normwise_instructions(), normwise_threads());
  std::fflush(stdout);
  Source source(seed);
  const auto start = std::chrono::steady_clock::now();
  int64_t cases = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
         seconds) {
    check(source.draw());
    ++cases;
  }
  check_concurrency(seed);
  check_failure();
  check_mode();
  check_openmp(seed);
  check_loan(seed);
  std::printf("%lld cases passed\n", static_cast<long long>(cases));
}
