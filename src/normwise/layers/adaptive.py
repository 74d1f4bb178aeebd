"""Adaptive instance norm: the statistics of one image on the content of another."""

from typing import Any

import keras

from normwise import geometry, ops
from normwise.geometry import Geometry
from normwise.layers.affine import Parametric
from normwise.norm import Operands, check_dtype, check_epsilon, check_shapes
from normwise.typing import Axis, Shape, Tensor


@keras.saving.register_keras_serializable("normwise")
class AdaptiveInstanceNormalization(Parametric):
    """Adaptive instance norm: give each channel the mean and the deviation that a style has there.

        y = deviation(style) * (content - mean(content)) / deviation(content) + mean(style)
        deviation = sqrt(var + epsilon)

    with the statistics of one sample's elements in one channel. On features of a convolutional
    network it draws the content in the style. It has no weights.

    Input: content (batch, ..., channels, ...) and style, each of rank 2 or more and any real dtype,
    with the same axis of channels and as many of them; the style may have other positions, and the
    batch of one style is that of all contents. Output: the shape of the content, in the layer's
    compute dtype. Masks, which Keras takes from either, leave what they mask out of the statistics;
    that of the content is passed on.

    Args:
        axis: the channel axis of both, an int or a list of one; any but the batch.
        epsilon: added to both variances, a number >= 0.
        **kwargs: of the base layer, as `name` and `dtype`.

    Raises:
        ValueError: on construction for the batch axis, and an epsilon that is negative or NaN; on a
            call for channels of unknown number, a style of other channels or another batch, an axis
            out of range, and a mask that does not fit.
        TypeError: axis is no int, epsilon no number, or an input complex.

    Numerics: arithmetic in float32 (float64 for float64), error of y below a small multiple of
    eps * (1 + |mean| / std) of content and style: see docs/numerics.md.

    Reference: Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance
        Normalization, 2017, https://arxiv.org/abs/1703.06868

    Example:

    >>> import numpy as np, normwise
    >>> layer = normwise.layers.AdaptiveInstanceNormalization(epsilon=0.0)
    >>> content, style = np.array([[[1.0], [3.0]]]), np.array([[[10.0], [10.0], [40.0], [40.0]]])
    >>> keras.ops.convert_to_numpy(layer(content, style)).tolist()
    [[[10.0], [40.0]]]
    """

    def __init__(self, axis: Axis = -1, epsilon: float = 1e-5, **kwargs: Any):
        super().__init__(**kwargs)
        self.axis = geometry.check_channel_axis(axis)
        self.epsilon = check_epsilon(epsilon)

    def geometry(self, input_shape: Shape) -> Geometry:
        """Which elements of a content, or of a style, of this shape share their statistics."""
        return geometry.group(input_shape, self.axis, geometry.INSTANCE)

    def call(
        self,
        content: Tensor,
        style: Tensor,
        content_mask: Tensor | None = None,
        style_mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize `content` to the statistics of `style`; masks are True where to keep."""
        sets, _ = self._check(content.shape, style.shape)
        options: dict[str, Any] = {"axis": self.axis, "epsilon": self.epsilon}
        mean, deviation = ops.InstanceNorm.statistics(style, style_mask, **options)
        # The style may have another rank.
        extents = sets.broadcast_shape((-1, *sets.parameter_shape))
        return ops.instance_norm(
            content,
            keras.ops.reshape(deviation, extents),
            keras.ops.reshape(mean, extents),
            mask=content_mask,
            dtype=self.compute_dtype,
            **options,
        )

    def _check(self, content_shape: Shape, style_shape: Shape) -> list[Geometry]:
        """The geometries of content and style, if they fit each other."""
        both = [self.geometry(shape) for shape in (content_shape, style_shape)]
        content, style = both
        if content.parameter_shape != style.parameter_shape:
            raise ValueError(
                f"style of shape {style.shape} has {style.groups} channels on axis {self.axis}, "
                f"but content of shape {content.shape} has {content.groups}; pass one with as many"
            )
        if None not in (content.outer, style.outer) and style.outer not in (1, content.outer):
            raise ValueError(
                f"style of shape {style.shape} has {style.outer} samples, but content of shape "
                f"{content.shape} has {content.outer}; pass a style for each, or one for all"
            )
        return both

    def compute_output_shape(
        self, content_shape: Shape, style_shape: Shape | None = None
    ) -> tuple[int | None, ...]:
        """The shape of the content."""
        self._check(content_shape, content_shape if style_shape is None else style_shape)
        return tuple(content_shape)

    def compute_output_spec(
        self,
        content: Tensor,
        style: Tensor,
        content_mask: Tensor | None = None,
        style_mask: Tensor | None = None,
    ) -> keras.KerasTensor:
        """A symbol of the result, with the errors that a call would raise."""
        masks = (content_mask, style_mask)
        for x, mask, sets in zip(
            (content, style), masks, self._check(content.shape, style.shape), strict=True
        ):
            check_dtype(x.dtype)
            check_shapes(sets, Operands(mask=mask))
        return keras.KerasTensor(content.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, whatever it was called on."""
        return {**super().get_config(), "axis": self.axis, "epsilon": self.epsilon}
