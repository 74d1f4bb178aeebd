// The kernels as XLA custom calls: two handlers in XLA's C interface for foreign functions.
//
// Its few structs are declared here and not included, so that no jaxlib is needed to build and one
// binary serves them all. The facts of their layout are those of xla/ffi/api/c_api.h, which comes
// with jaxlib: version 0.x of the interface, where minor versions only add at the end.
#include <cstddef>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#include "call.h"
#include "normwise.h"
#include "parallel.h"

namespace {

struct Extension {
  size_t struct_size;
  int32_t type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  Extension* extensions;
  int32_t major;
  int32_t minor;
};

struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Error;  // opaque, and owned by XLA

struct ErrorArguments {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  int32_t code;
};

struct DestroyArguments {
  size_t struct_size;
  Extension* extensions;
  Error* error;
};

struct ScheduleArguments {
  size_t struct_size;
  Extension* extensions;
  void* context;
  void (*task)(void*);
  void* data;
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(ErrorArguments*);
  const void* get_message;
  void (*destroy_error)(DestroyArguments*);
  const void* others[8];
  Error* (*schedule)(ScheduleArguments*);
};

struct Buffer {
  size_t struct_size;
  Extension* extensions;
  int32_t dtype;
  void* data;
  int64_t rank;
  int64_t* extents;
};

// Of arguments, and of results.
struct Buffers {
  size_t struct_size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  Buffer** items;
};

struct Array {
  int32_t dtype;
  size_t count;
  void* data;
};

struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  const void* names;
  void** items;
};

struct Frame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  void* context;
  int32_t stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
};

constexpr int32_t kMetadata = 1;                         // type of an extension
constexpr int32_t kExecute = 3;                          // stage of a frame
constexpr int32_t kBuffer = 1;                           // kind of an argument and of a result
constexpr int32_t kArray = 1;                            // kind of an attribute
constexpr int32_t kInvalidArgument = 3, kInternal = 13;  // error codes
constexpr int32_t kS64 = 5, kF16 = 10, kF32 = 11, kF64 = 12, kBF16 = 16;
constexpr int32_t kMajor = 0, kMinor = 1;

void require(bool fact, const char* message) {
  if (!fact) throw std::invalid_argument(message);
}

Error* report(const Frame& frame, const std::string& message, int32_t code) {
  const std::string text = "normwise: " + message;
  ErrorArguments arguments{sizeof(ErrorArguments), nullptr, text.c_str(), code};
  return frame.api->create_error(&arguments);
}

// Whether XLA only asks, as it does at registration, which version of the interface this is.
bool answers_metadata(const Frame& frame) {
  for (Extension* asked = frame.extensions; asked != nullptr; asked = asked->next) {
    if (asked->type != kMetadata) continue;
    Metadata& metadata = *reinterpret_cast<MetadataExtension*>(asked)->metadata;
    metadata.version.major = kMajor;
    // Every minor version has what is used here; XLA gives up old ones after a year.
    metadata.version.minor = frame.api == nullptr ? kMinor : frame.api->version.minor;
    metadata.traits = 0;
    return true;
  }
  return false;
}

// The one attribute: the NormwiseNorm, as an array of 64-bit words.
NormwiseNorm norm_of(const Frame& frame) {
  const Attributes& attributes = frame.attributes;
  require(attributes.count == 1 && attributes.kinds[0] == kArray, "the norm is no array");
  const auto* words = static_cast<const Array*>(attributes.items[0]);
  require(words->dtype == kS64, "the norm is no array of 64-bit integers");
  return normwise::checked(words->data, words->count * sizeof(int64_t));
}

const Buffer& item(const Buffers& buffers, int64_t index) {
  require(buffers.kinds[index] == kBuffer, "an argument or a result is no buffer");
  return *buffers.items[index];
}

int64_t size(const Buffer& buffer) {
  int64_t elements = 1;
  for (int64_t axis = 0; axis < buffer.rank; ++axis) elements *= buffer.extents[axis];
  return elements;
}

// gamma, beta, the residual and their gradients are absent where they have no elements.
void* present(const Buffer& buffer) { return size(buffer) == 0 ? nullptr : buffer.data; }

int32_t dtype_of(const Buffer& x) {
  switch (x.dtype) {
    case kF32:
      return NORMWISE_FLOAT32;
    case kF64:
      return NORMWISE_FLOAT64;
    case kF16:
      return NORMWISE_FLOAT16;
    case kBF16:
      return NORMWISE_BFLOAT16;
    default:
      return -1;
  }
}

// A call of x, whose other tensors are yet to be filled in.
struct Operands : NormwiseOperands {
  explicit Operands(const Buffer& x_buffer) : NormwiseOperands{} {
    size = sizeof(NormwiseOperands);
    extents = x_buffer.extents;
    rank = int32_t(x_buffer.rank);
    dtype = dtype_of(x_buffer);
    x = x_buffer.data;
  }
};

void require_like(const Buffer& buffer, const Buffer& x, const char* message) {
  require(buffer.dtype == x.dtype && size(buffer) == size(x), message);
}

void require_like_if_any(const Buffer& buffer, const Buffer& x, const char* message) {
  if (size(buffer) > 0) require_like(buffer, x, message);
}

void require_parameter(const Buffer& buffer, const Buffer& x, const normwise::Norm& norm) {
  require(buffer.dtype == (x.dtype == kF64 ? kF64 : kF32) &&
              (size(buffer) == 0 || size(buffer) == norm.parameters()),
          "gamma, beta or its gradient has another dtype or size than the channels ask for");
}

void require_statistics(const Buffer& buffer, const Buffer& x, const normwise::Norm& norm) {
  require(buffer.dtype == (x.dtype == kF64 ? kF64 : kF32) && size(buffer) == 2 * norm.sets(),
          "the statistics have another dtype or size than their sets ask for");
}

void finish(int32_t status) {
  if (status == NORMWISE_FAILED) throw std::runtime_error(normwise_message());
  require(status == NORMWISE_OK, normwise_message());
}

void forward(const Frame& frame) {
  require(frame.arguments.count == 4 && frame.results.count == 3,
          "forward takes (x, gamma, beta, residual) and gives (y, statistics, sum)");
  const Buffer& x = item(frame.arguments, 0);
  const Buffer& gamma = item(frame.arguments, 1);
  const Buffer& beta = item(frame.arguments, 2);
  const Buffer& residual = item(frame.arguments, 3);
  const Buffer& y = item(frame.results, 0);
  const Buffer& statistics = item(frame.results, 1);
  const Buffer& sum = item(frame.results, 2);

  const NormwiseNorm described = norm_of(frame);
  Operands operands(x);
  const normwise::Norm norm =
      normwise::resolve(described, operands.dtype, operands.rank, operands.extents);
  require_parameter(gamma, x, norm);
  require_parameter(beta, x, norm);
  require_like(y, x, "y has another dtype or size than x");
  require_statistics(statistics, x, norm);
  require_like_if_any(residual, x, "the residual has another dtype or size than x");
  require_like(sum, residual, "the sum has another dtype or size than the residual");
  operands.gamma = present(gamma);
  operands.beta = present(beta);
  operands.residual = present(residual);
  operands.sum = present(sum);
  operands.y = y.data;
  operands.statistics = statistics.data;
  finish(normwise_forward(&described, &operands));
}

void backward(const Frame& frame) {
  require(frame.arguments.count == 6 && frame.results.count == 3,
          "backward takes (x, gamma, beta, statistics, dy, dsum) and gives (dx, dgamma, dbeta)");
  const Buffer& x = item(frame.arguments, 0);
  const Buffer& gamma = item(frame.arguments, 1);
  const Buffer& beta = item(frame.arguments, 2);
  const Buffer& statistics = item(frame.arguments, 3);
  const Buffer& dy = item(frame.arguments, 4);
  const Buffer& dsum = item(frame.arguments, 5);
  const Buffer& dx = item(frame.results, 0);
  const Buffer& dgamma = item(frame.results, 1);
  const Buffer& dbeta = item(frame.results, 2);

  const NormwiseNorm described = norm_of(frame);
  Operands operands(x);
  const normwise::Norm norm =
      normwise::resolve(described, operands.dtype, operands.rank, operands.extents);
  for (const Buffer* parameter : {&gamma, &beta, &dgamma, &dbeta}) {
    require_parameter(*parameter, x, norm);
  }
  require_like(dy, x, "dy has another dtype or size than x");
  require_like(dx, x, "dx has another dtype or size than x");
  require_like_if_any(dsum, x, "dsum has another dtype or size than x");
  require_statistics(statistics, x, norm);
  operands.gamma = present(gamma);
  operands.beta = present(beta);
  operands.statistics = statistics.data;
  operands.dy = dy.data;
  operands.dsum = present(dsum);
  operands.dx = dx.data;
  operands.dgamma = present(dgamma);
  operands.dbeta = present(dbeta);
  finish(normwise_backward(&described, &operands));
}

// Hands a task to the threads on which XLA runs everything else on the CPU.
bool schedule(void* pool, void (*task)(void*), void* data) {
  const Frame& frame = *static_cast<const Frame*>(pool);
  ScheduleArguments arguments{sizeof(ScheduleArguments), nullptr, frame.context, task, data};
  Error* error = frame.api->schedule(&arguments);
  if (error == nullptr) return true;
  DestroyArguments refused{sizeof(DestroyArguments), nullptr, error};
  frame.api->destroy_error(&refused);
  return false;
}

// Run `kernel` on a frame; what it throws goes to XLA as an error, for no exception may pass C.
Error* run(Frame* frame, void (*kernel)(const Frame&)) {
  if (answers_metadata(*frame) || frame->stage != kExecute) return nullptr;
  try {
    require(frame->struct_size >= offsetof(Frame, attributes) + sizeof(Attributes) &&
                frame->api->struct_size >= sizeof(Api) && frame->api->version.major == kMajor,
            "this jaxlib speaks another version of XLA's foreign function interface");
    const normwise::Loan loan(schedule, frame);
    kernel(*frame);
    return nullptr;
  } catch (const std::invalid_argument& invalid) {
    return report(*frame, invalid.what(), kInvalidArgument);
  } catch (const std::exception& failure) {
    return report(*frame, failure.what(), kInternal);
  }
}

}  // namespace

extern "C" {

NORMWISE_API Error* normwise_jax_forward(Frame* frame) { return run(frame, forward); }

NORMWISE_API Error* normwise_jax_backward(Frame* frame) { return run(frame, backward); }
}
