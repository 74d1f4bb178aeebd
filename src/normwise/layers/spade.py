"""Spatially adaptive norm: gamma and beta of each position, from a map of the image."""

from typing import Any

import keras

from normwise.kernels import composite
from normwise.layers.affine import Affine, Parameter, given, mask_for
from normwise.layers.group import InstanceNormalization
from normwise.layers.modulated import Conditioned
from normwise.typing import Constraint, Initializer, Regularizer, Shape, Tensor


@keras.saving.register_keras_serializable("normwise")
class SPADE(Conditioned):
    """Spatially adaptive norm: a map of the image scales and shifts each of its elements.

        y = activation((1 + scale) * norm(x) + shift)
        scale, shift = the halves of conv(relu(conv(segmentation)))

    with the norm's own activation, and a gamma and a beta of the norm, if it has them, as part of
    norm(x). A norm takes out what an image that is made of a map has from it; this puts it back, at
    each position. The map is of any height and width: position i of n takes that of the map at
    floor(i * m / n) of m.

    Input: images (batch, height, width, channels), or with channels first (batch, channels, height,
    width), of any real dtype; and the map, of the same order of axes with channels of its own, as
    one for each class. Output: the shape of the images, in the layer's compute dtype. A mask leaves
    what it masks out of the statistics.

    Args:
        norm: a layer of normwise whose axes fit `data_format`; None for instance norm without gamma
            and beta, with an epsilon of 1e-5.
        filters: of the first convolution.
        kernel_size: of both convolutions, an int or two.
        data_format: "channels_last" or "channels_first", by default that of Keras's configuration.
        kernel_initializer, bias_initializer: of the kernels and the biases of both convolutions.
        kernel_regularizer, bias_regularizer: of the same, or None.
        kernel_constraint, bias_constraint: of the same, or None.
        **kwargs: of the base layer, as `name` and `dtype`, by default that of the norm.

    Weights, those of the norm first: the kernels and biases of `hidden`, kernel_size + (channels of
    the map, filters), and of `modulation`, kernel_size + (filters, 2 * channels), which counts the
    channels of the scale, then those of the shift. The kernels lie so in either data_format.

    Raises:
        TypeError: norm is no layer of normwise.
        ValueError: on construction for another data_format, and for filters and a kernel_size that
            Conv2D refuses; on a call for images or maps of another rank than 4, maps of another
            number of samples, or channels of unknown number.

    Numerics: the norm's arithmetic in float32 (float64 for float64), and with it the scale and the
    shift; the convolutions are in the compute dtype.

    Reference: Park et al., Semantic Image Synthesis with Spatially-Adaptive Normalization, 2019,
        https://arxiv.org/abs/1903.07291

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.SPADE(filters=16, data_format="channels_last")
    >>> y = layer(np.ones((2, 8, 8, 6), "float32"), np.ones((2, 32, 32, 3), "float32"))
    >>> [tuple(w.shape) for w in layer.weights]
    [(3, 3, 3, 16), (16,), (3, 3, 16, 12), (12,)]
    """

    # Of both convolutions, whose weights they are.
    parameters = (Parameter("kernel"), Parameter("bias"))

    def __init__(
        self,
        norm: Affine | None = None,
        filters: int = 128,
        kernel_size: int | tuple[int, int] = 3,
        data_format: str | None = None,
        kernel_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        kernel_regularizer: Regularizer = None,
        bias_regularizer: Regularizer = None,
        kernel_constraint: Constraint = None,
        bias_constraint: Constraint = None,
        **kwargs: Any,
    ):
        options = given(locals())
        del options["filters"], options["kernel_size"], options["data_format"]
        data_format = _check_data_format(data_format)
        if norm is None:
            options["norm"] = InstanceNormalization(
                _channel_axis(data_format),
                epsilon=1e-5,
                center=False,
                scale=False,
                dtype=kwargs.get("dtype"),
            )
        super().__init__(**options)
        self.filters, self.kernel_size = filters, kernel_size
        self.data_format = data_format
        self.hidden = self._convolution(filters, "hidden", activation="relu")

    def _convolution(self, filters: int, name: str, **options: Any) -> keras.layers.Conv2D:
        # Channels last whatever the data_format: TensorFlow's convolutions know no other order on
        # the CPU, and to transpose the map costs little.
        return keras.layers.Conv2D(
            filters,
            self.kernel_size,
            padding="same",
            data_format="channels_last",
            dtype=self.dtype_policy,
            name=name,
            **{option: getattr(self, option) for option, _ in self._options()},
            **options,
        )

    def build(self, inputs_shape: Shape, segmentation_shape: Shape) -> None:
        """Create the weights for images and maps of these shapes."""
        self._check(inputs_shape, segmentation_shape)
        self._build_norm(inputs_shape)
        channels = self._channels("x", inputs_shape)
        classes = self._channels("segmentation", segmentation_shape)
        self.hidden.build((None, None, None, classes))
        self.modulation = self._convolution(2 * channels, "modulation")
        self.modulation.build((None, None, None, self.filters))

    def _channels(self, name: str, shape: Shape) -> int:
        axis = _channel_axis(self.data_format)
        channels = shape[axis]
        if channels is None:
            raise ValueError(
                f"{name} has shape {tuple(shape)}, so the number of channels on axis {axis} is "
                "unknown; give it a fixed extent, as in keras.Input((None, None, 16))"
            )
        return channels

    def call(self, inputs: Tensor, segmentation: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `inputs`, and modulate them by `segmentation`.

        `mask` (True = keep) leaves elements out of the statistics.
        """
        self._check(inputs.shape, segmentation.shape)
        scale_and_shift = self.modulation(self.hidden(self._laid_on(inputs, segmentation)))
        if self.data_format == "channels_first":
            scale_and_shift = keras.ops.transpose(scale_and_shift, (0, 3, 1, 2))
        made = keras.ops.cast(scale_and_shift, self._arithmetic(inputs))
        gamma, beta = keras.ops.split(made, 2, axis=_channel_axis(self.data_format))
        sets = self.norm.geometry(inputs.shape)
        own = [each if each is None else composite.spread(each, sets) for each in self.norm.own()]
        gamma, beta, offset = self._with_own(gamma, beta, own)
        return self.norm.normalize(
            inputs,
            gamma,
            beta,
            gamma_offset=offset,
            mask=mask_for(inputs, mask),
            dtype=self.compute_dtype,
        )

    def _laid_on(self, inputs: Tensor, segmentation: Tensor) -> Tensor:
        """The map at the height and width of the inputs, channels last, in the compute dtype."""
        x = keras.ops.cast(segmentation, self.compute_dtype)
        first = self.data_format == "channels_first"
        if first:
            x = keras.ops.transpose(x, (0, 2, 3, 1))
        for axis in (1, 2):
            extent = keras.ops.shape(inputs)[axis + 1 if first else axis]
            of_map = keras.ops.shape(x)[axis]
            # Extents that are symbols may have no comparison.
            if not (type(extent) is type(of_map) is int and extent == of_map):
                nearest = keras.ops.arange(extent, dtype="int32") * of_map // extent
                x = _rows(x, nearest, extent, axis)
        return x

    def _check(self, inputs_shape: Shape, segmentation_shape: Shape) -> None:
        for name, shape in (("x", inputs_shape), ("segmentation", segmentation_shape)):
            if len(shape) != 4:
                raise ValueError(
                    f"{name} has shape {tuple(shape)}, but SPADE takes images and maps of rank 4; "
                    "make labels a channel each, as by keras.ops.one_hot"
                )
        samples, maps = inputs_shape[0], segmentation_shape[0]
        if isinstance(samples, int) and isinstance(maps, int) and samples != maps:
            raise ValueError(
                f"segmentation has shape {tuple(segmentation_shape)}, but x of shape "
                f"{tuple(inputs_shape)} has {samples} samples; pass a map for each"
            )

    def compute_output_shape(
        self, inputs_shape: Shape, segmentation_shape: Shape | None = None
    ) -> tuple[int | None, ...]:
        """The shape of the images."""
        return self.norm.compute_output_shape(inputs_shape)

    def compute_output_spec(
        self, inputs: Tensor, segmentation: Tensor, mask: Tensor | None = None
    ) -> keras.KerasTensor:
        """A symbol of the result, with the errors that a call would raise."""
        self._check(inputs.shape, segmentation.shape)
        return self.norm.symbols(inputs, mask, None, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was built on."""
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "data_format": self.data_format,
        }


def _rows(x: Tensor, index: Tensor, count: Any, axis: int) -> Tensor:
    """Those of `index`, `count` of them, along an axis: of a matrix, which exports to ONNX too."""
    x = keras.ops.moveaxis(x, axis, 0)
    given, *others = keras.ops.shape(x)
    matrix = keras.ops.take(keras.ops.reshape(x, (given, -1)), index, axis=0)
    return keras.ops.moveaxis(keras.ops.reshape(matrix, (count, *others)), 0, axis)


def _check_data_format(data_format: str | None) -> str:
    """Return `data_format`, or that of Keras's configuration, if it is one."""
    found = keras.config.image_data_format() if data_format is None else data_format
    if found not in ("channels_last", "channels_first"):
        raise ValueError(
            f"data_format={data_format!r} is no order of axes; use 'channels_last' or "
            "'channels_first'"
        )
    return found


def _channel_axis(data_format: str) -> int:
    return 1 if data_format == "channels_first" else -1
