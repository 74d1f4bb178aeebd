// The kernels as XLA custom calls: two handlers in XLA's C interface for foreign functions.
//
// Its few structs are declared here and not included, so that no jaxlib is needed to build and one
// binary serves them all. The facts of their layout are those of xla/ffi/api/c_api.h, which comes
// with jaxlib: version 0.x of the interface, where minor versions only add at the end.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

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

struct Name {
  const char* characters;
  size_t length;
};

struct Scalar {
  int32_t dtype;
  void* value;
};

struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  Name** names;
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
constexpr int32_t kScalar = 3;                           // kind of an attribute
constexpr int32_t kInvalidArgument = 3, kInternal = 13;  // error codes
constexpr int32_t kS64 = 5, kF16 = 10, kF32 = 11, kF64 = 12, kBF16 = 16;
constexpr int32_t kMajor = 0, kMinor = 1;

// Thrown within this file only: what a call got wrong.
struct Invalid {
  std::string message;
};

void require(bool fact, const char* message) {
  if (!fact) throw Invalid{message};
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

template <typename Value>
Value attribute(const Frame& frame, const char* name, int32_t dtype) {
  const Attributes& attributes = frame.attributes;
  for (int64_t i = 0; i < attributes.count; ++i) {
    const Name& found = *attributes.names[i];
    if (found.length != std::strlen(name)) continue;
    if (std::memcmp(found.characters, name, found.length) != 0) continue;
    const auto* scalar = static_cast<const Scalar*>(attributes.items[i]);
    if (attributes.kinds[i] != kScalar || scalar->dtype != dtype) {
      throw Invalid{std::string("attribute ") + name + " has another type than expected"};
    }
    Value value;
    std::memcpy(&value, scalar->value, sizeof(value));
    return value;
  }
  throw Invalid{std::string("attribute ") + name + " is missing"};
}

int64_t integer(const Frame& frame, const char* name) {
  return attribute<int64_t>(frame, name, kS64);
}

double real(const Frame& frame, const char* name) { return attribute<double>(frame, name, kF64); }

const Buffer& item(const Buffers& buffers, int64_t index) {
  require(buffers.kinds[index] == kBuffer, "an argument or a result is no buffer");
  return *buffers.items[index];
}

int64_t product(const Buffer& buffer, int64_t first, int64_t end) {
  int64_t extent = 1;
  for (int64_t axis = first; axis < end; ++axis) extent *= buffer.extents[axis];
  return extent;
}

int64_t size(const Buffer& buffer) { return product(buffer, 0, buffer.rank); }

// gamma, beta and their gradients are absent where they have no elements.
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
      throw Invalid{"x has no dtype of the kernels: float32, float64, float16, bfloat16"};
  }
}

NormwiseNorm norm_of(const Frame& frame, const Buffer& x) {
  const int64_t outer_end = integer(frame, "outer_end");
  const int64_t before_end = integer(frame, "before_end");
  const int64_t channels_end = integer(frame, "channels_end");
  const int64_t groups = integer(frame, "groups");
  require(0 <= outer_end && outer_end <= before_end && before_end <= channels_end &&
              channels_end <= x.rank,
          "the layout does not fit the rank of x");
  const int64_t channels = product(x, before_end, channels_end);
  require(groups > 0 && channels % groups == 0, "the groups do not divide the channels");

  NormwiseNorm norm{};
  norm.outer = product(x, 0, outer_end);
  norm.before = product(x, outer_end, before_end);
  norm.groups = groups;
  norm.members = channels / groups;
  norm.after = product(x, channels_end, x.rank);
  norm.keeps_after = integer(frame, "keeps_after") != 0;
  norm.centred = integer(frame, "centred") != 0;
  norm.dtype = dtype_of(x);
  norm.activation = static_cast<int32_t>(integer(frame, "activation"));
  norm.epsilon = real(frame, "epsilon");
  norm.slope = real(frame, "slope");
  require(!norm.keeps_after || (norm.before == 1 && norm.groups == 1),
          "a layout that keeps after has neither before nor groups");
  return norm;
}

void require_like(const Buffer& buffer, const Buffer& x, const char* message) {
  require(buffer.dtype == x.dtype && size(buffer) == size(x), message);
}

void require_parameter(const Buffer& buffer, const Buffer& x, const NormwiseNorm& norm) {
  require(buffer.dtype == (x.dtype == kF64 ? kF64 : kF32) &&
              (size(buffer) == 0 || size(buffer) == norm.groups * norm.members),
          "gamma, beta or its gradient has another dtype or size than the channels ask for");
}

void require_statistics(const Buffer& buffer, const Buffer& x, const NormwiseNorm& norm) {
  const int64_t sets = norm.outer * (norm.keeps_after ? norm.after : norm.groups);
  require(buffer.dtype == (x.dtype == kF64 ? kF64 : kF32) && size(buffer) == 2 * sets,
          "the statistics have another dtype or size than their sets ask for");
}

void forward(const Frame& frame) {
  require(frame.arguments.count == 3 && frame.results.count == 2,
          "forward takes (x, gamma, beta) and gives (y, statistics)");
  const Buffer& x = item(frame.arguments, 0);
  const Buffer& gamma = item(frame.arguments, 1);
  const Buffer& beta = item(frame.arguments, 2);
  const Buffer& y = item(frame.results, 0);
  const Buffer& statistics = item(frame.results, 1);

  const NormwiseNorm norm = norm_of(frame, x);
  require_parameter(gamma, x, norm);
  require_parameter(beta, x, norm);
  require_like(y, x, "y has another dtype or size than x");
  require_statistics(statistics, x, norm);
  normwise_forward(&norm, x.data, present(gamma), present(beta), y.data, statistics.data);
}

void backward(const Frame& frame) {
  require(frame.arguments.count == 5 && frame.results.count == 3,
          "backward takes (x, gamma, beta, statistics, dy) and gives (dx, dgamma, dbeta)");
  const Buffer& x = item(frame.arguments, 0);
  const Buffer& gamma = item(frame.arguments, 1);
  const Buffer& beta = item(frame.arguments, 2);
  const Buffer& statistics = item(frame.arguments, 3);
  const Buffer& dy = item(frame.arguments, 4);
  const Buffer& dx = item(frame.results, 0);
  const Buffer& dgamma = item(frame.results, 1);
  const Buffer& dbeta = item(frame.results, 2);

  const NormwiseNorm norm = norm_of(frame, x);
  for (const Buffer* parameter : {&gamma, &beta, &dgamma, &dbeta}) {
    require_parameter(*parameter, x, norm);
  }
  require_like(dy, x, "dy has another dtype or size than x");
  require_like(dx, x, "dx has another dtype or size than x");
  require_statistics(statistics, x, norm);
  normwise_backward(&norm, x.data, present(gamma), present(beta), statistics.data, dy.data, dx.data,
                    present(dgamma), present(dbeta));
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
  } catch (const Invalid& invalid) {
    return report(*frame, invalid.message, kInvalidArgument);
  } catch (const std::exception& failure) {
    return report(*frame, failure.what(), kInternal);
  }
}

}  // namespace

extern "C" {

NORMWISE_API Error* normwise_jax_forward(Frame* frame) { return run(frame, forward); }

NORMWISE_API Error* normwise_jax_backward(Frame* frame) { return run(frame, backward); }
}
