"""Spectral norm, as a wrapper of another layer."""

import math
from typing import Any

import keras
from keras import ops

from normwise.kernels import state
from normwise.layers.wrappers import KernelWrapper, full_precision
from normwise.typing import Tensor

# Of inference that finds no u to use. They leave the sigma of a random kernel, whose largest
# singular values are close to each other, some percent too small at worst.
_ITERATIONS = 32
# Of sigma in one step. A u of another kernel has more, by far if one value of the kernel is large.
_LARGEST_STEP = 1.1


@keras.saving.register_keras_serializable("normwise")
class SpectralNormalization(KernelWrapper):
    """Spectral norm: call a layer with its kernel divided by the kernel's largest singular value.

        kernel / sigma,    sigma = v W u'    with    v = u W' / |u W'|,    u = v W / |v W|

    W is the kernel as a matrix with a column for each output, ' transposes, and u is kept from call
    to call: each call in training does `power_iterations` steps from the last u, which come close
    to the first singular vectors as the kernel moves slowly. The layer's Lipschitz constant is then
    about 1, which steadies the discriminator of a generative adversarial network. Wraps layers with
    a `kernel`, as Dense, EinsumDense, Conv1D to 3D, transposed and depthwise convolutions; with
    `embeddings`; SeparableConv1D and 2D (both kernels); and layers of recurrent cells (the
    `recurrent_kernel`).

    Gradients flow through kernel / sigma, with u and v as constants. A call in inference uses the
    u of the last call in training and changes nothing. Before there was one, or where one more step
    would raise sigma by a tenth, as after the kernel was set, it does 32 steps of its own from u.

    Replicas hold the same u, for it comes of the kernel alone. In a recurrent cell each time step
    is a call, but on JAX all time steps are one.

    Input and output: those of the wrapped layer.

    Args:
        layer: the layer to wrap.
        power_iterations: how many steps a call in training does, a positive int.
        compatible: whether to compute as TensorFlow Addons does. There a call in training sets the
            kernel itself to kernel / sigma, through which no gradient flows, the optimizer steps
            from there, and inference takes the kernel as it is; the matrix has a column for each
            index of the kernel's last axis. A config without this key is one of TensorFlow Addons
            and means True.
        **kwargs: of the base layer, as `name` and `dtype`.

    Weights, those that train first, in the order and of the shapes of TensorFlow Addons: those of
    the wrapped layer; then `sn_u` (1, columns). With `compatible` there follows `kernel_offset`,
    which added to the kernel gives the one that the calls in training have set; in a saved model of
    TensorFlow Addons the kernel is that one, so that its offset is 0. A separable convolution has
    `depthwise_sn_u` and `pointwise_sn_u`, and so on.

    Raises:
        TypeError: `layer` is no layer, or `compatible` no bool.
        ValueError: for a recurrent cell by itself, and a `power_iterations` that is no positive
            int; on the first call for a layer with neither kernel nor embeddings; for quantizing
            the layer, but to float8, and for LoRA, before `remove`.

    Numerics: sigma in float32 (float64 for float64), up to some percent too small after 32 steps
    for a random kernel. A kernel of zeros stays zeros and keeps its u.

    Reference: Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018,
        https://arxiv.org/abs/1802.05957

    Example:

    >>> import keras, numpy as np, normwise
    >>> layer = normwise.layers.SpectralNormalization(keras.layers.Dense(4), power_iterations=50)
    >>> y = layer(np.ones((2, 3), "float32"), training=True)
    >>> kernel = np.asarray(layer.remove().kernel)
    >>> bool(abs(np.linalg.norm(kernel, 2) - 1) < 1e-3)
    True
    """

    kernel_names = (*KernelWrapper.kernel_names, ("embeddings",))

    def __init__(
        self,
        layer: keras.Layer,
        power_iterations: int = 1,
        compatible: bool = False,
        **kwargs: Any,
    ):
        whole = isinstance(power_iterations, int) and not isinstance(power_iterations, bool)
        if not whole or power_iterations < 1:
            raise ValueError(
                f"power_iterations={power_iterations!r} is no number of iterations; expected a "
                "positive int, as 1"
            )
        if not isinstance(compatible, bool):
            raise TypeError(f"compatible={compatible!r} is neither True nor False; use one of them")
        super().__init__(layer, **kwargs)
        self.power_iterations = power_iterations
        self.compatible = compatible

    def build(self, input_shape):
        """Build the wrapped layer, and make u for its kernels."""
        super().build(input_shape)
        kernels = self.kernels()
        self._u = [self._add_u(kernel) for kernel in kernels]
        self._offsets = []
        if self.compatible:
            self._offsets = [self._add_offset(f"{k.name}_offset", k.variable, k) for k in kernels]

    @property
    def u(self) -> keras.Variable | list[keras.Variable]:
        """The vector that is kept; of a separable convolution the two of them."""
        return self._u[0] if len(self._u) == 1 else list(self._u)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Call the wrapped layer with its kernel divided by the largest singular value."""
        return self.call_with(self._values(training), inputs, training)

    def remove(self) -> keras.Layer:
        """Give the wrapped layer the kernel that inference uses, and return it without the norm.

        The predictions stay as they are, those of the wrapper too.
        """
        self._release()
        values = self._values(training=False)
        for kernel in self.kernels():
            kernel.variable.assign(values[id(kernel.variable)])
        for offset in self._offsets:
            offset.assign(ops.zeros(offset.shape))
        return self.layer

    def get_config(self):
        """The arguments of the wrapper, and the config of the layer."""
        return {
            **super().get_config(),
            "power_iterations": self.power_iterations,
            "compatible": self.compatible,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The wrapper of a config; one of TensorFlow Addons computes as it did there."""
        return super().from_config({"compatible": True, **config}, custom_objects)

    def _add_u(self, kernel):
        columns = math.prod([kernel.variable.shape[axis] for axis in self._column_axes(kernel)])
        return self.add_weight(
            name=f"{kernel.prefix}sn_u",
            shape=(1, columns),
            dtype=kernel.dtype,
            # Not near length 1, which says that training has set it.
            initializer=keras.initializers.TruncatedNormal(stddev=0.02 / math.sqrt(columns)),
            trainable=False,
            autocast=False,
        )

    def _column_axes(self, kernel):
        """The axes of the kernel that make the columns of its matrix."""
        return (-1,) if self.compatible else kernel.output_axes

    def _values(self, training):
        """What the layer is called with, by the `id` of the kernel that it takes the place of."""
        kernels = self.kernels()
        if self.compatible:
            given = zip(kernels, self._u, self._offsets, strict=True)
            return {id(k.variable): self._assigned(k, u, o, training) for k, u, o in given}
        given = zip(kernels, self._u, strict=True)
        return {id(k.variable): self._divided(k, u, training) for k, u in given}

    def _divided(self, kernel, u, training):
        with state.outside_loops(kernel.variable.value, u.value):
            left, right = self._vectors(full_precision(kernel.variable), kernel, u, training)
        weight = full_precision(kernel.variable)
        return weight / self._sigma(weight, kernel, left, right)

    def _assigned(self, kernel, u, offset, training):
        """The kernel as TensorFlow Addons would have set it, by this call too if it trains."""
        if not training:
            return full_precision(kernel.variable) + full_precision(offset)
        with state.outside_loops(kernel.variable.value, u.value):
            trained = ops.stop_gradient(full_precision(kernel.variable))
            weight = trained + full_precision(offset)
            vectors = self._vectors(weight, kernel, u, training)
            moved = weight / self._sigma(weight, kernel, *vectors) - trained
            offset.assign(moved)
        return full_precision(kernel.variable) + moved

    def _vectors(self, weight, kernel, u, training):
        """The first singular vectors (1, rows), (1, columns), as far as iterations tell."""
        matrix = ops.stop_gradient(_as_matrix(weight, self._column_axes(kernel)))
        # Not `ops.matmul`, which on PyTorch takes float64 down to float32.
        right = full_precision(u)
        left = _unit(right @ ops.transpose(matrix))
        if not training:
            right = _unit(right)
            return state.choose(
                _fits(matrix, u, left, right),
                lambda: [left, right],
                lambda: list(_iterate(matrix, left, right)),
            )
        for step in range(self.power_iterations):
            if step:
                left = _unit(right @ ops.transpose(matrix))
            right = _unit(left @ matrix)
        kept = ops.where(ops.any(right != 0), right, full_precision(u))
        u.assign(ops.stop_gradient(kept))
        return left, _unit(kept)

    def _sigma(self, weight, kernel, left, right):
        """The largest singular value, with the kernel's gradient."""
        sigma = ops.sum((left @ _as_matrix(weight, self._column_axes(kernel))) * right)
        return ops.where(sigma > 0, sigma, ops.ones_like(sigma))


def _fits(matrix, u, left, right):
    """Whether u comes from training, and from that of this kernel.

    Training leaves u with length 1, and so close to a singular vector that a step hardly raises
    sigma, as it does where the kernel has been set since.
    """
    u = full_precision(u)
    length = ops.sqrt(ops.sum(ops.square(u)))
    ahead = left @ matrix
    sigma, next_sigma = ops.sum(ahead * right), ops.sum(ahead * _unit(ahead))
    return ops.logical_and(ops.abs(length - 1) < 0.01, next_sigma <= _LARGEST_STEP * sigma)


def _iterate(matrix, left, right):
    """The vectors after as many steps as tell sigma to a few percent."""

    def step(_, vectors):
        left, right = vectors
        right = _unit(left @ matrix)
        return _unit(right @ ops.transpose(matrix)), right

    return ops.fori_loop(0, _ITERATIONS, step, (left, right))


def _as_matrix(weight, column_axes):
    """The kernel with what tells outputs apart in columns, the rest in rows."""
    columns = [axis % weight.ndim for axis in column_axes]
    rows = [axis for axis in range(weight.ndim) if axis not in columns]
    width = math.prod([weight.shape[axis] for axis in columns])
    return ops.reshape(ops.transpose(weight, rows + columns), (-1, width))


def _unit(row):
    """The row at length 1; zeros stay zeros."""
    largest = ops.norm(row, ord=math.inf, axis=-1, keepdims=True)
    # The root of a sum of squares would be 0 or infinite for elements beyond 1e-19 or 1e19.
    scaled = row / ops.where(largest > 0, largest, ops.ones_like(largest))
    length = ops.sqrt(ops.sum(ops.square(scaled)))
    return scaled / ops.where(length > 0, length, ops.ones_like(length))


keras.saving.get_custom_objects()["Addons>SpectralNormalization"] = SpectralNormalization
