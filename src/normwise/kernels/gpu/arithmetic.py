"""How every kernel reads elements and writes them, and what it calculates, in float32."""

import triton
import triton.language as tl


@triton.jit
def read(POINTER, place, there, EVICTION: tl.constexpr = ""):
    """Elements in float32, 0 where there is none."""
    values = tl.load(POINTER + place, mask=there, other=0.0, eviction_policy=EVICTION)
    return values.to(tl.float32)


@triton.jit
def write(POINTER, place, values, there, EVICTION: tl.constexpr = ""):
    """Write elements in the dtype of the buffer, where there are any."""
    values = values.to(POINTER.dtype.element_ty)
    tl.store(POINTER + place, values, mask=there, eviction_policy=EVICTION)


@triton.jit
def plus(x, RESIDUAL, SUM, place, there):
    """x and a residual, rounded as the sum is that is written where there is a SUM; or x alone."""
    if RESIDUAL is not None:
        total = (x + read(RESIDUAL, place, there)).to(RESIDUAL.dtype.element_ty)
        if SUM is not None:
            tl.store(SUM + place, total, mask=there)
        x = total.to(tl.float32)
    return x


@triton.jit
def read_sum(X, RESIDUAL, SUM, place, there):
    """What is normalized: elements of x, or of its sum with a residual."""
    return plus(read(X, place, there), RESIDUAL, SUM, place, there)


@triton.jit
def write_gradient(DX, DSUM, place, dx, there, EVICTION: tl.constexpr = ""):
    """Write dx, and in it what comes to the sum of x and a residual by another way."""
    if DSUM is not None:
        dx += read(DSUM, place, there, EVICTION)
    write(DX, place, dx, there, EVICTION)


@triton.jit
def inverse_root(variance, epsilon):
    """1 / sqrt(variance + epsilon), and 0 for equal elements at epsilon 0."""
    radicand = variance + epsilon
    defined = radicand != 0
    root = tl.sqrt_rn(tl.where(defined, radicand, 1.0))
    return tl.where(defined, tl.div_rn(1.0, root), 0.0)


@triton.jit
def not_negative(squares):
    """Squares that rounding may leave below 0. NaN stays NaN, as in `tl.maximum` it would not."""
    return tl.where(squares < 0, 0.0, squares)


@triton.jit
def normalize(x, mean, inv_std, there):
    """The normalized elements, and 0 where there is none, for mean * inv_std may be infinite."""
    return tl.where(there, (x - mean) * inv_std, 0.0)


@triton.jit
def parameter(POINTER, index, there, absent: tl.constexpr):
    """Gamma or beta at `index`, or what stands for one that is absent."""
    if POINTER is None:
        values = tl.full(index.shape, absent, tl.float32)
    else:
        values = tl.load(POINTER + index, mask=there, other=absent).to(tl.float32)
    return values


@triton.jit
def own(channel, channels, programs_of_sample):
    """Where gamma and beta of a channel lie: one after another, where each sample has its own."""
    if programs_of_sample is not None:
        channel += (tl.program_id(0) // programs_of_sample).to(tl.int64) * channels
    return channel


@triton.jit
def bounds(chunk, length, end, programs_of_chunk, programs_of_sample):
    """Where a chunk begins and what it may not pass: the `end` of all that share gamma and beta."""
    start = chunk * length
    if programs_of_sample is not None:
        chunks = programs_of_sample // programs_of_chunk
        before = chunk // chunks * end
        start, end = before + chunk % chunks * length, before + end
    return start, end


@triton.jit
def activated(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The activation of z, by its name in `activations.NAMES`."""
    if ACTIVATION == "leaky_relu":
        # By `z < 0`, so that NaN stays NaN.
        z = tl.where(z < 0, z * SLOPE, z)
    elif ACTIVATION == "sigmoid":
        z = tl.sigmoid(z)
    elif ACTIVATION == "tanh":
        z = 2 * tl.sigmoid(2 * z) - 1
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        tl.static_assert(ACTIVATION == "identity")
    return z


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The derivative of `activated` at z."""
    if ACTIVATION == "leaky_relu":
        slope = tl.where(z > 0, 1.0, SLOPE)
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(z)
        slope = s * (1 - s)
    elif ACTIVATION == "tanh":
        s = tl.sigmoid(2 * z)
        slope = 4 * s * (1 - s)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        slope = s * (1 + z * (1 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        square = z * z
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * square))
        slope = s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * square)
    return slope


@triton.jit
def result(normalized, gamma, beta, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """What the norm makes of a normalized element."""
    return activated(normalized * gamma + beta, ACTIVATION, SLOPE)


@triton.jit
def through(dy, normalized, gamma, beta, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The gradient before the activation, of dy after it."""
    if ACTIVATION != "identity":
        dy = dy * derivative(normalized * gamma + beta, ACTIVATION, SLOPE)
    return dy
