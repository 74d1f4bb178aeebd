// TensorFlow's door to the kernels: the ops NormwiseForward and NormwiseBackward for its CPUs.
//
// They are registered through TensorFlow's C API, which keeps its names and signatures from release
// to release where the C++ API does not. What is needed of it is declared here and looked up when
// this library is loaded, so that the library builds without TensorFlow, serves every version of
// it, and loads where there is none.

#include <dlfcn.h>

#include <cstddef>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "call.h"
#include "normwise.h"

namespace {

struct TF_Status;
struct TF_Tensor;
struct TF_OpDefinitionBuilder;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
struct TF_ShapeInferenceContext;
struct TF_ShapeHandle;

enum TF_Code { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8 };
enum TF_DataType { TF_FLOAT = 1, TF_DOUBLE = 2, TF_BFLOAT16 = 14, TF_HALF = 19 };

using ShapeFunction = void (*)(TF_ShapeInferenceContext*, TF_Status*);
using Create = void* (*)(TF_OpKernelConstruction*);
using Compute = void (*)(void*, TF_OpKernelContext*);
using Delete = void (*)(void*);

// Every function of the C API that is used: result, name without its TF_, parameters.
#define TENSORFLOW_FUNCTIONS(_)                                                                   \
  _(TF_Status*, NewStatus, (void))                                                                \
  _(void, DeleteStatus, (TF_Status*))                                                             \
  _(void, SetStatus, (TF_Status*, TF_Code, const char* message))                                  \
  _(TF_Code, GetCode, (const TF_Status*))                                                         \
  _(void, DeleteTensor, (TF_Tensor*))                                                             \
  _(int, NumDims, (const TF_Tensor*))                                                             \
  _(int64_t, Dim, (const TF_Tensor*, int axis))                                                   \
  _(void*, TensorData, (const TF_Tensor*))                                                        \
  _(int64_t, TensorElementCount, (const TF_Tensor*))                                              \
  _(TF_OpDefinitionBuilder*, NewOpDefinitionBuilder, (const char* op))                            \
  _(void, OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char* spec))               \
  _(void, OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char* spec))              \
  _(void, OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char* spec))                \
  _(void, OpDefinitionBuilderSetShapeInferenceFunction, (TF_OpDefinitionBuilder*, ShapeFunction)) \
  _(void, RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                            \
  _(TF_ShapeHandle*, NewShapeHandle, (void))                                                      \
  _(void, DeleteShapeHandle, (TF_ShapeHandle*))                                                   \
  _(void, ShapeInferenceContextGetInput,                                                          \
    (TF_ShapeInferenceContext*, int index, TF_ShapeHandle*, TF_Status*))                          \
  _(void, ShapeInferenceContextSetOutput,                                                         \
    (TF_ShapeInferenceContext*, int index, TF_ShapeHandle*, TF_Status*))                          \
  _(void, ShapeInferenceContextSetUnknownShape, (TF_ShapeInferenceContext*, TF_Status*))          \
  _(TF_KernelBuilder*, NewKernelBuilder,                                                          \
    (const char* op, const char* device, Create, Compute, Delete))                                \
  _(void, KernelBuilder_TypeConstraint,                                                           \
    (TF_KernelBuilder*, const char* attribute, TF_DataType, TF_Status*))                          \
  _(void, RegisterKernelBuilder, (const char* name, TF_KernelBuilder*, TF_Status*))               \
  _(void, OpKernelConstruction_GetAttrSize,                                                       \
    (TF_OpKernelConstruction*, const char* name, int32_t* list, int32_t* bytes, TF_Status*))      \
  _(void, OpKernelConstruction_GetAttrString,                                                     \
    (TF_OpKernelConstruction*, const char* name, char*, size_t bytes, TF_Status*))                \
  _(void, OpKernelConstruction_GetAttrType,                                                       \
    (TF_OpKernelConstruction*, const char* name, TF_DataType*, TF_Status*))                       \
  _(void, OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))                   \
  _(void, GetInput, (TF_OpKernelContext*, int index, TF_Tensor**, TF_Status*))                    \
  _(TF_Tensor*, AllocateOutput,                                                                   \
    (TF_OpKernelContext*, int index, TF_DataType, const int64_t* extents, int rank, size_t bytes, \
     TF_Status*))                                                                                 \
  _(void, OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))

struct TensorFlow {
#define DECLARE(result, name, parameters) result(*name) parameters;
  TENSORFLOW_FUNCTIONS(DECLARE)
#undef DECLARE

  // Whether TensorFlow is in this process and has all of them.
  bool find() {
    // Already there or not wanted: this library must not be what brings TensorFlow in. Its symbols
    // are not global, so only its own handle finds them.
#if defined(__APPLE__)
    constexpr const char* kName = "libtensorflow_framework.2.dylib";
#else
    constexpr const char* kName = "libtensorflow_framework.so.2";
#endif
    void* library = dlopen(kName, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return false;
    bool all = true;
#define FIND(result, name, parameters)                                  \
  name = reinterpret_cast<decltype(name)>(dlsym(library, "TF_" #name)); \
  all = all && name != nullptr;
    TENSORFLOW_FUNCTIONS(FIND)
#undef FIND
    return all;
  }
};

TensorFlow tf;

class Status {
 public:
  Status() : status_(tf.NewStatus()) {}
  ~Status() { tf.DeleteStatus(status_); }
  Status(const Status&) = delete;
  Status& operator=(const Status&) = delete;

  operator TF_Status*() { return status_; }
  bool ok() const { return tf.GetCode(status_) == TF_OK; }
  void fail(TF_Code code, const char* message) { tf.SetStatus(status_, code, message); }

  // Keeps the first failure.
  void require(bool condition, const char* message) {
    if (!condition && ok()) fail(TF_INVALID_ARGUMENT, message);
  }

 private:
  TF_Status* status_;
};

// An input or an output of a running op: TensorFlow owns the memory, this only the handle.
class Tensor {
 public:
  Tensor(TF_OpKernelContext* context, int input, Status& status) {
    if (status.ok()) tf.GetInput(context, input, &tensor_, status);
  }
  Tensor(TF_OpKernelContext* context, int output, TF_DataType dtype, const int64_t* extents,
         int rank, Status& status) {
    if (!status.ok()) return;
    size_t bytes = dtype == TF_DOUBLE ? 8 : dtype == TF_FLOAT ? 4 : 2;
    for (int axis = 0; axis < rank; ++axis) bytes *= extents[axis];
    tensor_ = tf.AllocateOutput(context, output, dtype, extents, rank, bytes, status);
  }
  ~Tensor() {
    if (tensor_ != nullptr) tf.DeleteTensor(tensor_);
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  int rank() const { return tf.NumDims(tensor_); }
  int64_t extent(int axis) const { return tf.Dim(tensor_, axis); }
  int64_t elements() const { return tf.TensorElementCount(tensor_); }
  void* data() const { return tf.TensorData(tensor_); }
  // A gamma, beta, residual or dsum that is an empty vector stands for none. One of more axes is
  // another batch's, or has no less elements than it should.
  bool absent() const { return rank() == 1 && elements() == 0; }
  void* data_if_any() const { return elements() == 0 ? nullptr : data(); }

 private:
  TF_Tensor* tensor_ = nullptr;
};

constexpr int kMaxRank = 254;  // TensorFlow's own

// The extents of a tensor; TensorFlow keeps them as int64 too, but hands them out one by one.
struct Shape {
  int rank = 0;
  int64_t extents[kMaxRank];

  explicit Shape(const Tensor& tensor) : Shape(tensor, 0, tensor.rank()) {}
  Shape(const Tensor& tensor, int64_t first, int64_t last) { append(tensor, first, last); }

  void append(int64_t extent) { extents[rank++] = extent; }
  void append(const Tensor& tensor, int64_t first, int64_t last) {
    for (int64_t axis = first; axis < last; ++axis) append(tensor.extent(axis));
  }
  bool operator==(const Shape& other) const {
    return rank == other.rank && std::memcmp(extents, other.extents, rank * sizeof *extents) == 0;
  }
};

// The attributes of a node.
struct Kernel {
  TF_DataType dtype = TF_FLOAT, arithmetic = TF_FLOAT;
  NormwiseNorm norm = {};

  Kernel(TF_OpKernelConstruction* construction, Status& status) {
    tf.OpKernelConstruction_GetAttrType(construction, "T", &dtype, status);
    if (status.ok()) tf.OpKernelConstruction_GetAttrType(construction, "A", &arithmetic, status);
    int32_t list = 0, bytes = 0;
    if (status.ok())
      tf.OpKernelConstruction_GetAttrSize(construction, "norm", &list, &bytes, status);
    if (!status.ok()) return;
    std::string text(size_t(bytes), '\0');
    tf.OpKernelConstruction_GetAttrString(construction, "norm", &text[0], text.size(), status);
    if (status.ok()) norm = normwise::checked(text.data(), text.size());
  }

  int32_t own_dtype() const {
    return dtype == TF_DOUBLE     ? NORMWISE_FLOAT64
           : dtype == TF_HALF     ? NORMWISE_FLOAT16
           : dtype == TF_BFLOAT16 ? NORMWISE_BFLOAT16
                                  : NORMWISE_FLOAT32;
  }

  Shape statistics_shape(const Tensor& x) const {
    Shape shape(x, 0, norm.outer_end);
    shape.append(2);
    if (norm.keeps_after) {
      shape.append(x, norm.channels_end, x.rank());
    } else {
      shape.append(norm.groups);
    }
    return shape;
  }
};

// A call of x, whose other tensors are yet to be filled in, and its norm.
struct Operands : NormwiseOperands {
  normwise::Norm norm;

  Operands(const Kernel& kernel, const Tensor& x_tensor, const Shape& shape) : NormwiseOperands{} {
    // The statistics may have an axis more.
    if (shape.rank >= kMaxRank) throw std::invalid_argument("x must have a rank of less than 254");
    size = sizeof(NormwiseOperands);
    extents = shape.extents;
    rank = shape.rank;
    dtype = kernel.own_dtype();
    x = x_tensor.data();
    norm = normwise::resolve(kernel.norm, dtype, rank, extents);
  }
};

// gamma or beta: absent, or one element per channel, of each sample where they have their own.
void require_parameter(const Tensor& parameter, const normwise::Norm& norm, Status& status) {
  if (!status.ok() || parameter.absent()) return;
  status.require(parameter.elements() == norm.parameters(),
                 "gamma and beta must each have one element per channel (and sample, where they "
                 "have their own), or none at all");
}

// The residual or the gradient of the sum: absent, or like x.
void require_like_if_any(const Tensor& tensor, const Shape& shape, Status& status) {
  if (status.ok() && !tensor.absent()) {
    status.require(shape == Shape(tensor), "residual and dsum must have the shape of x");
  }
}

void finish(int32_t result, Status& status) {
  if (result == NORMWISE_OK) return;
  status.fail(result == NORMWISE_INVALID ? TF_INVALID_ARGUMENT : TF_RESOURCE_EXHAUSTED,
              normwise_message());
}

void forward(const Kernel& kernel, TF_OpKernelContext* context, Status& status) {
  const Tensor x(context, 0, status), gamma(context, 1, status), beta(context, 2, status),
      residual(context, 3, status);
  if (!status.ok()) return;
  const Shape shape(x);
  Operands operands(kernel, x, shape);
  require_parameter(gamma, operands.norm, status);
  require_parameter(beta, operands.norm, status);
  require_like_if_any(residual, shape, status);
  if (!status.ok()) return;

  const Shape sets = kernel.statistics_shape(x), of_sum(residual);
  const Tensor y(context, 0, kernel.dtype, shape.extents, shape.rank, status);
  const Tensor statistics(context, 1, kernel.arithmetic, sets.extents, sets.rank, status);
  const Tensor sum(context, 2, kernel.dtype, of_sum.extents, of_sum.rank, status);
  if (!status.ok()) return;
  operands.gamma = gamma.data_if_any();
  operands.beta = beta.data_if_any();
  operands.residual = residual.data_if_any();
  operands.sum = sum.data_if_any();
  operands.y = y.data();
  operands.statistics = statistics.data();
  finish(normwise_forward(&kernel.norm, &operands), status);
}

void backward(const Kernel& kernel, TF_OpKernelContext* context, Status& status) {
  const Tensor x(context, 0, status), gamma(context, 1, status), beta(context, 2, status),
      statistics(context, 3, status), dy(context, 4, status), dsum(context, 5, status);
  if (!status.ok()) return;
  const Shape shape(x);
  Operands operands(kernel, x, shape);
  require_parameter(gamma, operands.norm, status);
  require_parameter(beta, operands.norm, status);
  status.require(shape == Shape(dy), "dy must have the shape of x");
  require_like_if_any(dsum, shape, status);
  if (!status.ok()) return;
  status.require(kernel.statistics_shape(x) == Shape(statistics),
                 "statistics must be those of the forward pass");

  const Shape of_gamma(gamma), of_beta(beta);
  const Tensor dx(context, 0, kernel.dtype, shape.extents, shape.rank, status);
  const Tensor dgamma(context, 1, kernel.arithmetic, of_gamma.extents, of_gamma.rank, status);
  const Tensor dbeta(context, 2, kernel.arithmetic, of_beta.extents, of_beta.rank, status);
  if (!status.ok()) return;
  operands.gamma = gamma.data_if_any();
  operands.beta = beta.data_if_any();
  operands.statistics = statistics.data();
  operands.dy = dy.data();
  operands.dsum = dsum.data_if_any();
  operands.dx = dx.data();
  operands.dgamma = dgamma.data_if_any();
  operands.dbeta = dbeta.data_if_any();
  finish(normwise_backward(&kernel.norm, &operands), status);
}

// Runs `work`; what it throws goes to TensorFlow as a status, for no exception may pass C.
template <class Work>
void guarded(Status& status, const Work& work) {
  try {
    work();
  } catch (const std::invalid_argument& invalid) {
    status.fail(TF_INVALID_ARGUMENT, invalid.what());
  } catch (const std::exception& error) {  // no memory
    status.fail(TF_RESOURCE_EXHAUSTED, error.what());
  }
}

void* create(TF_OpKernelConstruction* construction) {
  Status status;
  Kernel* kernel = nullptr;
  guarded(status, [&] { kernel = new Kernel(construction, status); });
  if (!status.ok()) tf.OpKernelConstruction_Failure(construction, status);
  return kernel;
}

template <void (*pass)(const Kernel&, TF_OpKernelContext*, Status&)>
void compute(void* kernel, TF_OpKernelContext* context) {
  Status status;
  guarded(status, [&] { pass(*static_cast<Kernel*>(kernel), context, status); });
  if (!status.ok()) tf.OpKernelContext_Failure(context, status);
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

// An output has the shape of an input.
void set_shape(TF_ShapeInferenceContext* context, int output, int input, TF_Status* status) {
  TF_ShapeHandle* shape = tf.NewShapeHandle();
  if (tf.GetCode(status) == TF_OK) {
    tf.ShapeInferenceContextGetInput(context, input, shape, status);
  }
  if (tf.GetCode(status) == TF_OK) {
    tf.ShapeInferenceContextSetOutput(context, output, shape, status);
  }
  tf.DeleteShapeHandle(shape);
}

void forward_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  // The C API lets no shape function read an integer attribute, which the statistics would need.
  tf.ShapeInferenceContextSetUnknownShape(context, status);
  set_shape(context, 0, 0, status);  // y, of x
  set_shape(context, 2, 3, status);  // the sum, of the residual
}

// Whole, since Keras's optimizers refuse a gradient of unknown shape.
void backward_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  for (int i = 0; i < 3; ++i) set_shape(context, i, i, status);
}

// The parts of an op's definition end with a null pointer.
void register_op(const char* name, const char* const* inputs, const char* const* outputs,
                 ShapeFunction shapes, Compute compute) {
  static const char* const attributes[] = {"T: {half, bfloat16, float, double}",
                                           "A: {float, double}", "norm: string", nullptr};
  TF_OpDefinitionBuilder* op = tf.NewOpDefinitionBuilder(name);
  for (; *inputs != nullptr; ++inputs) tf.OpDefinitionBuilderAddInput(op, *inputs);
  for (; *outputs != nullptr; ++outputs) tf.OpDefinitionBuilderAddOutput(op, *outputs);
  for (auto spec = attributes; *spec != nullptr; ++spec) tf.OpDefinitionBuilderAddAttr(op, *spec);
  tf.OpDefinitionBuilderSetShapeInferenceFunction(op, shapes);
  // A failure leaves the op or its kernel out, which whoever calls it is told.
  Status status;
  tf.RegisterOpDefinition(op, status);

  for (TF_DataType dtype : {TF_FLOAT, TF_DOUBLE, TF_HALF, TF_BFLOAT16}) {
    TF_KernelBuilder* kernel = tf.NewKernelBuilder(name, "CPU", create, compute, destroy);
    const TF_DataType arithmetic = dtype == TF_DOUBLE ? TF_DOUBLE : TF_FLOAT;
    tf.KernelBuilder_TypeConstraint(kernel, "T", dtype, status);
    tf.KernelBuilder_TypeConstraint(kernel, "A", arithmetic, status);
    tf.RegisterKernelBuilder(name, kernel, status);
  }
}

// Runs when the library is loaded. tf.load_op_library lists what is registered at that moment.
__attribute__((constructor)) void register_ops() {
  if (!tf.find()) return;
  static const char* const x[] = {"x: T", "gamma: A", "beta: A", "residual: T", nullptr};
  static const char* const y[] = {"y: T", "statistics: A", "sum: T", nullptr};
  register_op("NormwiseForward", x, y, forward_shapes, compute<forward>);
  static const char* const dy[] = {"x: T",  "gamma: A", "beta: A", "statistics: A",
                                   "dy: T", "dsum: T",  nullptr};
  static const char* const dx[] = {"dx: T", "dgamma: A", "dbeta: A", nullptr};
  register_op("NormwiseBackward", dy, dx, backward_shapes, compute<backward>);
}

}  // namespace
