"""Weight standardization, as a wrapper of another layer."""

import math
import numbers
from typing import Any

import keras

from normwise import ops
from normwise.layers.wrappers import Kernel, KernelWrapper, full_precision
from normwise.norm import check_epsilon
from normwise.typing import Initializer, Tensor


@keras.saving.register_keras_serializable("normwise")
class WeightStandardization(KernelWrapper):
    """Weight standardization: call a layer with a kernel of mean 0 and variance 1 for each output.

        kernel = (w - mean) / sqrt(var + epsilon)
        scaled:   kernel = gain * gamma / sqrt(fan_in) * (w - mean) / sqrt(var + epsilon)

    with the mean and the variance of the fan_in weights that lead to one output. It smooths the
    loss where batches are small, before a group norm; scaled, with a gain that is trained for each
    output, it keeps the variance of the activations in networks without any norm. The kernel is
    computed at every call, and the gradients go to w and the gain. Wraps layers with a `kernel`, as
    Dense, EinsumDense, Conv1D to 3D and the transposed convolutions; DepthwiseConv1D and 2D, whose
    outputs are the channels of each channel; SeparableConv1D and 2D (both kernels); and layers of
    recurrent cells (the `recurrent_kernel`).

    Input and output: those of the wrapped layer.

    Args:
        layer: the layer to wrap.
        epsilon: added to the variance, a number >= 0.
        scaled: whether to multiply by gain * gamma / sqrt(fan_in).
        gamma: the constant that makes up for what the activation takes from the variance, a number
            > 0: sqrt(2 / (1 - 1 / pi)) before a relu. Only with `scaled`.
        gain_initializer: of the gain.
        **kwargs: of the base layer, as `name` and `dtype`.

    The defaults are timm's `StdConv2d`, with `scaled=True` its `ScaledStdConv2d`.

    Weights, those that train first: with `scaled` the `gain` (outputs,), (channels, multiplier) of
    a depthwise kernel, `depthwise_gain` and `pointwise_gain` of a separable convolution; then those
    of the wrapped layer, among them `kernel` (w), whose regularizer and constraint are those of w.

    Raises:
        TypeError: `layer` is no layer, epsilon or gamma no number, or `scaled` no bool.
        ValueError: for a recurrent cell by itself, an epsilon that is negative or NaN, a gamma that
            is not > 0, and a gamma without `scaled`; on the first call for a layer with no kernel,
            and a kernel with one weight for an output; for quantizing the layer, but to float8, and
            for LoRA, before `remove`.

    Numerics: the kernel is computed in float32 (float64 for float64), from deviations from the mean
    and not from squares, and rounded to the layer's compute dtype once. Equal weights become zeros.

    Differences from the authors' programs: that of 2019 adds 1e-5 to the root and not to the
    variance, which on PyTorch is the unbiased one, and that of NFNets takes max(var * fan_in, 1e-4)
    for fan_in * (var + epsilon). timm has the formulas above.

    Reference: Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, 2019, https://arxiv.org/abs/1903.10520. Scaled: Brock et al.,
        Characterizing signal propagation to close the performance gap in unnormalized ResNets,
        2021, https://arxiv.org/abs/2101.08692

    Example:

    >>> import keras, numpy as np, normwise
    >>> layer = normwise.layers.WeightStandardization(keras.layers.Conv2D(4, 3), scaled=True)
    >>> x = np.ones((2, 8, 8, 3), "float32")
    >>> y = layer(x)
    >>> [(w.name, tuple(w.shape)) for w in layer.trainable_weights]
    [('gain', (4,)), ('kernel', (3, 3, 3, 4)), ('bias', (4,))]
    >>> bool(keras.ops.max(keras.ops.abs(y)) < 1e-5)
    True
    """

    def __init__(
        self,
        layer: keras.Layer,
        epsilon: float = 1e-6,
        scaled: bool = False,
        gamma: float = 1.0,
        gain_initializer: Initializer = "ones",
        **kwargs: Any,
    ):
        if not isinstance(scaled, bool):
            raise TypeError(f"scaled={scaled!r} is neither True nor False; use one of them")
        gamma = _check_gamma(gamma)
        if gamma != 1 and not scaled:
            raise ValueError(
                f"gamma={gamma} belongs to the scaled kernel; set scaled=True, or leave gamma out"
            )
        super().__init__(layer, **kwargs)
        self.epsilon = check_epsilon(epsilon)
        self.scaled = scaled
        self.gamma = gamma
        self.gain_initializer = keras.initializers.get(gain_initializer)

    def build(self, input_shape):
        """Build the wrapped layer, and make a gain for its kernels."""
        super().build(input_shape)
        kernels = self.kernels()
        for kernel in kernels:
            _check_fan_in(kernel)
        self._gains = [self._add_gain(kernel) for kernel in kernels] if self.scaled else []

    @property
    def gain(self) -> keras.Variable | list[keras.Variable] | None:
        """The gain of each output; of a separable convolution the two of them; None unscaled."""
        return list(self._gains) if len(self._gains) > 1 else next(iter(self._gains), None)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Call the wrapped layer with its kernel standardized."""
        return self.call_with(self._values(), inputs, training)

    def remove(self) -> keras.Layer:
        """Give the wrapped layer the kernel that it is called with, and return it without the norm.

        Its predictions are those of the wrapper. The wrapper would standardize that kernel anew,
        and is of no more use.
        """
        self._release()
        values = self._values()
        for kernel in self.kernels():
            kernel.variable.assign(values[id(kernel.variable)])
        return self.layer

    def get_config(self):
        """The arguments of the wrapper, and the config of the layer."""
        return {
            **super().get_config(),
            "epsilon": self.epsilon,
            "scaled": self.scaled,
            "gamma": self.gamma,
            "gain_initializer": keras.initializers.serialize(self.gain_initializer),
        }

    def _add_gain(self, kernel):
        return self.add_weight(
            name=f"{kernel.prefix}gain",
            shape=[kernel.variable.shape[axis] for axis in sorted(kernel.output_axes)],
            dtype=kernel.dtype,
            initializer=self.gain_initializer,
            autocast=False,
        )

    def _values(self):
        """What the layer is called with, by the `id` of the weight that it takes the place of."""
        kernels = self.kernels()
        values = [
            ops.layer_norm(full_precision(k.variable), axis=_input_axes(k), epsilon=self.epsilon)
            for k in kernels
        ]
        if self.scaled:
            values = [
                value * self._scale(kernel, gain)
                for value, kernel, gain in zip(values, kernels, self._gains, strict=True)
            ]
        return {id(kernel.variable): value for kernel, value in zip(kernels, values, strict=True)}

    def _scale(self, kernel, gain):
        """Gain * gamma / sqrt(fan_in), in a shape that broadcasts against the kernel."""
        gain = full_precision(gain) * (self.gamma / math.sqrt(_fan_in(kernel)))
        return keras.ops.expand_dims(gain, _input_axes(kernel))


def _input_axes(kernel: Kernel) -> tuple[int, ...]:
    """The axes over which a kernel's weights lead to the same output, counted from the end."""
    return tuple(axis for axis in range(-kernel.variable.ndim, 0) if axis not in kernel.output_axes)


def _fan_in(kernel: Kernel) -> int:
    # A list: torch.compile traces no product of a generator.
    return math.prod([kernel.variable.shape[axis] for axis in _input_axes(kernel)])


def _check_fan_in(kernel: Kernel) -> None:
    """Check that an output has weights enough to have a variance."""
    if _fan_in(kernel) < 2:
        raise ValueError(
            f"{kernel.name} of shape {tuple(kernel.variable.shape)} has {_fan_in(kernel)} weight "
            f"for each output of {type(kernel.owner).__name__}, and standardized it would be 0; "
            "wrap a layer with more inputs or positions, as a kernel_size above 1"
        )


def _check_gamma(gamma) -> float:
    """Return `gamma` as a float if it can scale a kernel."""
    remedy = "expected a number > 0, as 1.7128585504496627 before a relu"
    if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
        raise TypeError(f"gamma={gamma!r} is no number; {remedy}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma={gamma} cannot scale a kernel; {remedy}")
    return float(gamma)
