"""Weight norm, as a wrapper of another layer."""

import math
import warnings
from typing import Any

import keras
from keras import ops

from normwise.kernels import state
from normwise.layers.wrappers import Kernel, KernelWrapper, full_precision
from normwise.typing import Tensor

# TensorFlow Addons': below it a squared norm counts as it, so that a kernel of zeros stays zeros.
_SMALLEST_SQUARE = 1e-12
_DATA_EPSILON = 1e-10


@keras.saving.register_keras_serializable("normwise")
class WeightNormalization(KernelWrapper):
    """Weight norm: train a kernel's direction v and its length g instead of the kernel.

        kernel = g * v / |v|

    with the norm over all axes of v but the last. The kernel is computed at every call, and the
    gradients go to g and v. Wraps any layer with a `kernel`, as Dense, EinsumDense, Conv1D to 3D
    and the transposed convolutions; DepthwiseConv1D and 2D (g and the norm for each channel's
    filter); SeparableConv1D and 2D (both kernels); and the layers of recurrent cells, LSTM, GRU,
    SimpleRNN or RNN, of which it takes the `recurrent_kernel`.

    Input and output: those of the wrapped layer.

    Args:
        layer: the layer to wrap.
        data_init: whether the first call in training sets g and the bias from its input: with t
            what the layer gives without its activation, g becomes g / sqrt(var(t) + 1e-10) and the
            bias -mean(t) / sqrt(var(t) + 1e-10), mean and variance being those of an output
            channel, of the batches of all replicas together. Until then g is 1; an empty batch
            leaves it so. Without `data_init` g begins as |v|, so that the kernel is v.
        **kwargs: of the base layer, as `name` and `dtype`.

    Weights, those that train first, in the order and of the shapes of TensorFlow Addons: `g`
    (kernel.shape[-1],), `kernel` (v) and the wrapped layer's others; then `initialized` (), bool.
    With `data_init` there follow `g_offset` and, where the layer has a bias, `bias_offset`: what
    the data has added to g and bias, which in a saved model of TensorFlow Addons is in g and bias
    themselves, so that its offsets are 0. (Its `data_dep_init/kernel` and `/bias` are a copy of the
    first weights, for which there is no use.) A depthwise kernel has a g of (channels, multiplier);
    a separable convolution has `depthwise_g`, `pointwise_g` and `pointwise_g_offset`.

    Raises:
        TypeError: `layer` is no layer, or `data_init` no bool.
        ValueError: for a recurrent cell by itself; on the first call for a layer with no kernel,
            and for `data_init` with a g or a bias that does not fit the output channels; on the
            first in training for `data_init` in a recurrent cell on replicas of TensorFlow; for
            quantizing the layer, but to float8, and for LoRA, before `remove`.

    Replicas: those of a tf.distribute strategy, of torch's DistributedDataParallel and of Keras's
    distribution on JAX take the mean and variance of all their batches and hold the same weights.
    Ranks of torch that average gradients by themselves each take those of their own.

    In a recurrent cell: on JAX no data can be kept there, so that g and bias stay as they are, with
    a warning.

    Numerics: the kernel is computed in float32 (float64 for float64) and rounded to the layer's
    compute dtype once. So are t and its moments, whatever dtype the layer computes in.

    Differences from TensorFlow Addons: only a call in training takes its data to initialize, and
    later inputs may have other extents than the first. As there, the g of a transposed convolution
    belongs to the kernel's last axis, which is that of the input channels, and the kernel's
    regularizer and constraint are those of v. The bias's see it without its offset.

    Reference: Salimans and Kingma, Weight Normalization, 2016, https://arxiv.org/abs/1602.07868

    Example:

    >>> import keras, numpy as np, normwise
    >>> layer = normwise.layers.WeightNormalization(keras.layers.Dense(4), data_init=False)
    >>> x = np.ones((2, 3), "float32")
    >>> y = layer(x)
    >>> [(w.name, tuple(w.shape)) for w in layer.trainable_weights]
    [('g', (4,)), ('kernel', (3, 4)), ('bias', (4,))]
    >>> dense = layer.remove()
    >>> bool(keras.ops.max(keras.ops.abs(dense(x) - y)) < 1e-5)
    True
    """

    def __init__(self, layer: keras.Layer, data_init: bool = True, **kwargs: Any):
        if not isinstance(data_init, bool):
            raise TypeError(f"data_init={data_init!r} is neither True nor False; use one of them")
        super().__init__(layer, **kwargs)
        self.data_init = data_init

    def build(self, input_shape):
        """Build the wrapped layer, and make g for its kernels."""
        super().build(input_shape)
        kernels = self.kernels()
        self._g = [self._add_g(k, ones=self.data_init and k is kernels[-1]) for k in kernels]
        # Named here too, v comes next to g in the list of weights, as in TensorFlow Addons.
        self._v = [kernel.variable for kernel in kernels]
        self._initialized = self.add_weight(
            name="initialized",
            shape=(),
            dtype="bool",
            initializer="zeros" if self.data_init else "ones",
            trainable=False,
        )
        self._offsets = []
        if self.data_init:
            self._check_fits_data(input_shape)
            names = (f"{kernels[-1].prefix}g_offset", "bias_offset")
            self._offsets = [
                self._add_offset(name, weight, kernels[-1])
                for name, weight in zip(names, self._set_by_data(), strict=False)
            ]

    @property
    def g(self) -> keras.Variable | list[keras.Variable]:
        """The kernel's length; of a separable convolution the two of them."""
        return self._g[0] if len(self._g) == 1 else list(self._g)

    @property
    def v(self) -> keras.Variable | list[keras.Variable]:
        """The kernel's direction; of a separable convolution the two of them."""
        return self._v[0] if len(self._v) == 1 else list(self._v)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Call the wrapped layer with g * v / |v| for its kernel."""
        offsets = [offset.value for offset in self._offsets]
        if training and self.data_init:
            offsets = self._initialize(inputs, offsets)
        return self.call_with(self._values(offsets), inputs, training)

    def remove(self) -> keras.Layer:
        """Give the wrapped layer the kernel that it is called with, and return it without the norm.

        The predictions stay as they are, those of the wrapper too.
        """
        self._release()
        values = self._values(self._offsets)
        for kernel, g in zip(self.kernels(), self._g, strict=True):
            value = values[id(kernel.variable)]
            kernel.variable.assign(value)
            g.assign(ops.sqrt(ops.sum(ops.square(value), axis=_norm_axes(kernel))))
        for bias in self._set_by_data()[1:]:
            bias.assign(values[id(bias)])
        for offset in self._offsets:
            offset.assign(ops.zeros(offset.shape))
        return self.layer

    def get_config(self):
        """The arguments of the wrapper, and the config of the layer."""
        return {**super().get_config(), "data_init": self.data_init}

    def _add_g(self, kernel, ones):
        def length(shape, dtype):
            v = full_precision(kernel.variable)
            return ops.cast(ops.sqrt(ops.sum(ops.square(v), axis=_norm_axes(kernel))), dtype)

        return self.add_weight(
            name=f"{kernel.prefix}g",
            shape=kernel.variable.shape[-2 if kernel.depthwise else -1 :],
            dtype=kernel.dtype,
            initializer="ones" if ones else length,
            autocast=False,
        )

    def _set_by_data(self):
        """The weights that the data initializes: g, and the bias where the layer has one."""
        if not self.data_init:
            return []
        recurrent = isinstance(self.layer, keras.layers.RNN)
        bias = None if recurrent else getattr(self.layer, "bias", None)
        return [self._g[-1]] if bias is None else [self._g[-1], bias]

    def _values(self, offsets):
        """What the layer is called with, by the `id` of the weight that it takes the place of."""
        moved = {
            id(weight): full_precision(weight) + full_precision(offset)
            for weight, offset in zip(self._set_by_data(), offsets, strict=True)
        }
        for kernel, g in zip(self.kernels(), self._g, strict=True):
            v = full_precision(kernel.variable)
            square = ops.sum(ops.square(v), axis=_norm_axes(kernel), keepdims=True)
            length = moved.pop(id(g)) if id(g) in moved else full_precision(g)
            # A tensor, for the number would make it float32 on PyTorch.
            direction = v * ops.rsqrt(ops.maximum(square, ops.full_like(square, _SMALLEST_SQUARE)))
            moved[id(kernel.variable)] = direction * length
        return moved

    def _initialize(self, inputs, offsets):
        """The offsets after this call: those from its data, if it is the first that has any."""
        before = self._initialized.value
        if state.in_loop(before):
            warnings.warn(
                f"{self.name} cannot take its data to initialize here, in a loop that JAX "
                "compiles, as that of a recurrent layer; use data_init=False",
                stacklevel=2,
            )
            return offsets
        count, mean, variance = self._moments(inputs, before)
        some = count[0] > 0
        updated = [
            ops.stop_gradient(ops.where(some, new, offset))
            for new, offset in zip(self._offsets_from(mean, variance), offsets, strict=True)
        ]
        for offset, value in zip(self._offsets, updated, strict=True):
            offset.assign(value)
        self._initialized.assign(ops.logical_or(before, some))
        return updated

    def _moments(self, inputs, initialized):
        """Count, mean and variance (channels,) of the layer's output on all replicas.

        Once initialized they are not needed, and the count is 0.
        """
        plain = {"activation": None, "activity_regularizer": None}

        def sums():
            t = ops.stop_gradient(full_precision(self.call_precisely(inputs, **plain)))
            axes = [axis for axis in range(t.ndim) if axis != self._channel_axis() % t.ndim]
            count = ops.sum(ops.ones_like(t), axis=axes, keepdims=True)
            mean = ops.sum(t, axis=axes, keepdims=True) / ops.maximum(count, 1)
            squares = ops.sum(ops.square(t - mean), axis=axes)
            return [ops.reshape(each, (self._channels,)) for each in (count, mean, squares)]

        def nothing():
            dtype = full_precision(self._g[-1]).dtype
            return [ops.zeros((self._channels,), dtype) for _ in range(3)]

        count, mean, squares = state.choose(initialized, nothing, sums, in_graph=self.is_flat)
        # Chan's merge: the squares are of the deviations from the mean of all replicas.
        total, weighted = state.sum_over_replicas([count, count * mean], unless=initialized)
        divisor = ops.maximum(total, 1)
        merged = weighted / divisor
        squares = squares + count * ops.square(mean - merged)
        (squares,) = state.sum_over_replicas([squares], unless=initialized)
        return total, merged, squares / divisor

    def _offsets_from(self, mean, variance):
        scale = ops.rsqrt(variance + _DATA_EPSILON)
        g, *bias = self._set_by_data()
        # An LSTM's kernel holds four side by side, so its g is of four times the channels.
        repeats = math.prod(g.shape) // self._channels
        scales = ops.reshape(ops.tile(scale, [repeats]), g.shape)
        targets = [full_precision(g) * scales, -mean * scale]
        return [
            ops.cast(target - full_precision(weight), offset.dtype)
            for target, weight, offset in zip(targets, [g, *bias], self._offsets, strict=False)
        ]

    def _channel_axis(self):
        return 1 if getattr(self.layer, "data_format", None) == "channels_first" else -1

    def _check_fits_data(self, input_shape):
        shape = self.layer.compute_output_shape(input_shape)
        g, *bias = self._set_by_data()
        if not any(isinstance(extent, (list, tuple)) for extent in shape):
            channels = shape[self._channel_axis()]
            self._channels = channels
            fits = channels is not None and math.prod(g.shape) % channels == 0
            if fits and all(tuple(weight.shape) == (channels,) for weight in bias):
                return
        raise ValueError(
            f"data_init=True sets g of shape {tuple(g.shape)}"
            + "".join(f" and the bias of shape {tuple(weight.shape)}" for weight in bias)
            + f" by the channels of the output, but {type(self.layer).__name__} gives an output of "
            f"shape {shape}, which does not fit them; use data_init=False"
        )


def _norm_axes(kernel: Kernel) -> tuple[int, ...]:
    """The axes of the norm: all but the last, as TensorFlow Addons has it.

    It cannot wrap a depthwise kernel, so there the norm may be that of one channel's filter.
    """
    kept = 2 if kernel.depthwise else 1
    return tuple(range(kernel.variable.ndim - kept))


keras.saving.get_custom_objects()["Addons>WeightNormalization"] = WeightNormalization
