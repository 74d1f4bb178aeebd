"""The norms as functions of tensors, differentiable on every backend and usable in Keras models.

Each takes a backend tensor, a NumPy array or a Keras symbolic tensor `x` of rank 2 or more, and

    gamma, beta         tensors that scale and shift the result, or None. Each has the shape that
                        the function names; that shape behind the batch, for values of each sample's
                        own, as (batch, channels); or a shape that broadcasts to that of x, for
                        values of each element's own
    epsilon             added to the variance, a number >= 0
    gamma_offset        added to gamma, where there is one, in the dtype of the arithmetic: with 1
                        a gamma near 0 keeps all its digits
    residual            a tensor of the shape of x, or None. x + residual, rounded to the dtype of x
                        (of the result, for integers), is normalized in its place and returned too
    activation          applied to the result: a name that `keras.activations.get` knows, or a
                        callable
    mask                bool, True = keep: of the shape of x, or of its first axes as Keras passes
                        it, an extent of 1 standing for all. What is masked stays out of the
                        statistics
    return_statistics   whether to return, too, the mean of each set (0 where none is subtracted)
                        and sqrt(var + epsilon), which its elements are divided by: of the dtype of
                        the arithmetic, and of a shape that broadcasts against x
    dtype               of the result; by default that of x, or `keras.config.floatx()` for integers

and returns a tensor y of the shape of x; with a residual (y, sum); with `return_statistics` the
mean and the deviation at the end, as (y, mean, deviation). All are differentiable. The arithmetic
is in float64 where x or dtype is float64, in float32 otherwise. Sets without variance give beta,
empty inputs empty outputs; a NaN or an infinity stays in its set. See docs/numerics.md for the
bounds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import keras

from normwise import activations, dispatch, geometry, keras_private
from normwise.geometry import Geometry
from normwise.kernels import composite
from normwise.norm import (
    PER_ELEMENT,
    PER_SAMPLE,
    SHARED,
    Norm,
    Operands,
    check_dtype,
    check_epsilon,
    check_offset,
    check_shapes,
    dtype_name,
    mask_beside,
    sum_dtype,
)
from normwise.typing import Activation, Axis, DType, Shape, Tensor

__all__ = ["filter_response_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def group_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    groups: int = 32,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    gamma_offset: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation = None,
    mask: Tensor | None = None,
    return_statistics: bool = False,
    dtype: DType | None = None,
) -> Any:
    """Group norm: normalize each sample over groups of its channels.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    with the mean and the variance of one sample's elements in one group of neighbouring channels.

    Args:
        x: tensor (batch, ..., channels, ...) of any real dtype.
        gamma, beta: tensors (channels,) or None.
        groups: the number of groups; must divide the channels. -1 makes a group of every channel.
        axis: the channel axis, any but the batch.
        epsilon, gamma_offset, residual, activation, mask, return_statistics, dtype: see the module.

    Returns:
        A tensor of the shape of x; with a residual or `return_statistics` a tuple that begins with
        it, as the module says.

    Raises:
        ValueError: the groups do not divide the channels, the channels are unknown, the axis is
            the batch or out of range, or the shape of gamma, beta, mask or residual does not fit.
        TypeError: x is complex, or axis is no int.

    Numerics: the error of y stays below a small multiple of eps * (1 + |mean| / std).

    Reference: Wu and He, Group Normalization, 2018, https://arxiv.org/abs/1803.08494

    Example:

    >>> import numpy as np
    >>> from normwise import ops
    >>> x = np.arange(16, dtype="float32").reshape(1, 4, 4)
    >>> y = np.asarray(ops.group_norm(x, groups=2))
    >>> y[0, :, :2].mean().round(3) == y[0, :, 2:].mean().round(3) == 0
    np.True_
    """
    tensors = (x, gamma, beta, mask, None, residual)
    options = {
        "groups": groups,
        "axis": axis,
        "epsilon": epsilon,
        "gamma_offset": gamma_offset,
        "activation": activation,
        "return_statistics": return_statistics,
        "dtype": dtype,
    }
    return _call(GroupNorm, *tensors, **options)


def instance_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    gamma_offset: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation = None,
    mask: Tensor | None = None,
    return_statistics: bool = False,
    dtype: DType | None = None,
) -> Any:
    """Instance norm: normalize each channel of each sample over its positions.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    with the mean and the variance of one sample's elements in one channel.

    Args:
        x: tensor (batch, ..., channels, ...) of any real dtype.
        gamma, beta: tensors (channels,) or None.
        axis: the channel axis, any but the batch.
        epsilon, gamma_offset, residual, activation, mask, return_statistics, dtype: see the module.

    Returns:
        A tensor of the shape of x; with a residual or `return_statistics` a tuple that begins with
        it, as the module says.

    Raises:
        ValueError: the channels are unknown, the axis is the batch or out of range, or the shape of
            gamma, beta, mask or residual does not fit.
        TypeError: x is complex, or axis is no int.

    Numerics: the error of y stays below a small multiple of eps * (1 + |mean| / std).

    Reference: Ulyanov et al., Instance Normalization, 2016, https://arxiv.org/abs/1607.08022

    Example:

    >>> import numpy as np
    >>> from normwise import ops
    >>> y = ops.instance_norm(np.array([[[1.0, 5.0], [3.0, 5.0]]]), epsilon=0.0)
    >>> np.asarray(y).tolist()
    [[[-1.0, 0.0], [1.0, 0.0]]]
    """
    tensors = (x, gamma, beta, mask, None, residual)
    options = {
        "axis": axis,
        "epsilon": epsilon,
        "gamma_offset": gamma_offset,
        "activation": activation,
        "return_statistics": return_statistics,
        "dtype": dtype,
    }
    return _call(InstanceNorm, *tensors, **options)


def layer_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-3,
    gamma_offset: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation = None,
    mask: Tensor | None = None,
    return_statistics: bool = False,
    dtype: DType | None = None,
) -> Any:
    """Layer norm: normalize over the axes named, every other position by itself.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    with the mean and the variance over `axis`. For all activations of a sample name every axis but
    the batch, as in `axis=[1, 2, 3]`.

    Args:
        x: tensor of any real dtype.
        gamma, beta: tensors of the shape of x's normalized axes in ascending order, or None.
        axis: an int, or a list of axes in any order.
        epsilon, gamma_offset, residual, activation, mask, return_statistics, dtype: see the module.

    Returns:
        A tensor of the shape of x; with a residual or `return_statistics` a tuple that begins with
        it, as the module says.

    Raises:
        ValueError: an axis is out of range or named twice, or the shape of gamma, beta, mask or
            residual does not fit.
        TypeError: x is complex, or axis is neither an int nor a list of ints.

    Numerics: the error of y stays below a small multiple of eps * (1 + |mean| / std).

    Reference: Ba et al., Layer Normalization, 2016, https://arxiv.org/abs/1607.06450

    Example:

    >>> import numpy as np
    >>> from normwise import ops
    >>> np.asarray(ops.layer_norm(np.array([[1.0, 3.0], [6.0, 6.0]]), epsilon=0.0)).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    tensors = (x, gamma, beta, mask, None, residual)
    options = {
        "axis": axis,
        "epsilon": epsilon,
        "gamma_offset": gamma_offset,
        "activation": activation,
        "return_statistics": return_statistics,
        "dtype": dtype,
    }
    return _call(LayerNorm, *tensors, **options)


def rms_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    axis: Axis = -1,
    epsilon: float = 1e-6,
    gamma_offset: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation = None,
    mask: Tensor | None = None,
    return_statistics: bool = False,
    dtype: DType | None = None,
) -> Any:
    """RMS norm: divide by the root mean square over the axes named; no mean is subtracted.

        y = activation(gamma * x / sqrt(mean(x^2) + epsilon) + beta)

    Args:
        x: tensor of any real dtype.
        gamma, beta: tensors of the shape of x's normalized axes in ascending order, or None.
        axis: an int, or a list of axes in any order.
        epsilon, gamma_offset, residual, activation, mask, return_statistics, dtype: see the module.

    Returns:
        A tensor of the shape of x; with a residual or `return_statistics` a tuple that begins with
        it, as the module says.

    Raises:
        ValueError: an axis is out of range or named twice, or the shape of gamma, beta, mask or
            residual does not fit.
        TypeError: x is complex, or axis is neither an int nor a list of ints.

    Numerics: the error of y stays below a small multiple of eps.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019,
        https://arxiv.org/abs/1910.07467

    Example:

    >>> import numpy as np
    >>> from normwise import ops
    >>> np.asarray(ops.rms_norm(np.array([[3.0, -3.0], [0.0, 0.0]]))).round(3).tolist()
    [[1.0, -1.0], [0.0, 0.0]]
    """
    tensors = (x, gamma, beta, mask, None, residual)
    options = {
        "axis": axis,
        "epsilon": epsilon,
        "gamma_offset": gamma_offset,
        "activation": activation,
        "return_statistics": return_statistics,
        "dtype": dtype,
    }
    return _call(RMSNorm, *tensors, **options)


def filter_response_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    axis: Axis = geometry.SPATIAL,
    epsilon: float = 1e-6,
    learned_epsilon: Tensor | None = None,
    gamma_offset: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation = None,
    mask: Tensor | None = None,
    return_statistics: bool = False,
    dtype: DType | None = None,
) -> Any:
    """Filter response norm: divide each channel of each sample by its root mean square.

        y = activation(gamma * x / sqrt(mean(x^2) + epsilon + |learned_epsilon|) + beta)

    with the mean over the positions of one sample's channel; no mean is subtracted.

    Args:
        x: tensor (batch, ..., channels, ...) of any real dtype.
        gamma, beta: tensors (channels,) or None.
        axis: the spatial axes, which are all but the batch and the channels: an int, or a list of
            axes in any order, empty for (batch, channels).
        epsilon: as in the module.
        learned_epsilon: a tensor () or (1,) whose absolute value is added to epsilon, or None. y is
            differentiable in it; the native kernels do not take it.
        gamma_offset, residual, activation, mask, return_statistics, dtype: see the module.

    Returns:
        A tensor of the shape of x; with a residual or `return_statistics` a tuple that begins with
        it, as the module says.

    Raises:
        ValueError: the axes are not those of x but two, the batch is among them, one is out of
            range or named twice, the channels are unknown, or the shape of gamma, beta,
            learned_epsilon, mask or residual does not fit.
        TypeError: x is complex, or axis is neither an int nor a list of ints.

    Numerics: the error of y stays below a small multiple of eps.

    Reference: Singh and Krishnan, Filter Response Normalization Layer, 2019,
        https://arxiv.org/abs/1911.09737

    Example:

    >>> import numpy as np
    >>> from normwise import ops
    >>> x = np.array([[[3.0, -2.0], [-3.0, -2.0]]])
    >>> np.asarray(ops.filter_response_norm(x, axis=1)).round(3).tolist()
    [[[1.0, -1.0], [-1.0, -1.0]]]
    """
    tensors = (x, gamma, beta, mask, learned_epsilon, residual)
    options = {
        "axis": axis,
        "epsilon": epsilon,
        "gamma_offset": gamma_offset,
        "activation": activation,
        "return_statistics": return_statistics,
        "dtype": dtype,
    }
    return _call(FilterResponseNorm, *tensors, **options)


def _call(operation: Any, x: Tensor, *operands: Tensor | None, **options: Any) -> Tensor:
    for tensor in (x, *operands):
        if isinstance(tensor, keras.KerasTensor):
            return operation(**options)(x, *operands)
    return operation.compute(x, *operands, **options)


class _Operation(keras.Operation):
    """A norm as a node of a functional model: the options of its function, kept for saving."""

    subtract_mean = True
    geometry: Callable[..., Geometry] = staticmethod(geometry.layer)

    def __init__(self, *, name: str | None = None, **options: Any) -> None:
        super().__init__(name=name)
        options["activation"] = keras.activations.get(options["activation"])
        if options.get("dtype") is not None:
            # A framework's own dtype could not be saved.
            options["dtype"] = dtype_name(options["dtype"])
        self.options = options

    def call(self, x: Tensor, *operands: Tensor | None) -> Any:
        return self.compute(x, *operands, **self.options)

    def compute_output_spec(self, x: Tensor, *operands: Tensor | None) -> Any:
        options = {**self.options, "activation": activations.IDENTITY}
        returns_statistics = options.pop("return_statistics", False)
        check_offset(options.pop("gamma_offset", 0.0))
        norm = self.norm(x, Operands(*operands), **options)
        lie = check_shapes(norm.geometry, Operands(*operands))
        results = [keras.KerasTensor(x.shape, dtype=norm.y_dtype)]
        if lie.residual:
            results.append(keras.KerasTensor(x.shape, dtype=sum_dtype(norm.x_dtype, norm.y_dtype)))
        if returns_statistics:
            sets = norm.geometry.broadcast_statistics_shape
            results += [keras.KerasTensor(sets, dtype=norm.arithmetic) for _ in range(2)]
        return tuple(results) if len(results) > 1 else results[0]

    def get_config(self) -> dict[str, Any]:
        activation = keras.activations.serialize(self.options["activation"])
        options = {**self.options, "activation": activation}
        return keras_private.saved_axes({"name": self.name, **options})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return super().from_config(keras_private.restored_axes(config))

    @classmethod
    def norm(
        cls,
        x: Tensor,
        operands: Operands,
        *,
        epsilon: float,
        activation: activations.Activation = activations.IDENTITY,
        dtype: DType | None = None,
        **where: Any,
    ) -> Norm:
        """What a call is: the Norm of an `x`, with operands, one of activations, and options."""
        key: tuple[Any, ...] = (cls, x.shape, x.dtype, operands.lie(), epsilon, activation, dtype)
        if isinstance(where["axis"], tuple):
            # Else (1.0, 2), which is an error, would be found where (1, 2) was before.
            where["axis_types"] = tuple(map(type, where["axis"]))
        try:
            return _norm_of(*key, **where)
        except (TypeError, ValueError):
            # What cannot be looked up: a list of axes, an extent that is unknown or a symbol,
            # integers, whose result has the dtype in force; or indeed a wrong option.
            return _norm_of.__wrapped__(*key, floatx=keras.config.floatx(), **where)

    @classmethod
    def compute(
        cls,
        x: Tensor,
        *operands: Tensor | None,
        activation: Activation,
        gamma_offset: float = 0.0,
        return_statistics: bool = False,
        **options: Any,
    ) -> Any:
        """Say what the call is, choose a kernel for it and run it."""
        if type(x).__name__ == "RaggedTensor":
            options |= {"activation": activation, "gamma_offset": gamma_offset}
            return cls._compute_ragged(x, *operands, return_statistics or None, **options)
        x = keras.ops.convert_to_tensor(x, sparse=False)
        operands = Operands(*operands)
        function: Any = keras.activations.get(activation)
        fused = activations.find(function)
        norm = cls.norm(x, operands, activation=fused or activations.IDENTITY, **options)
        operands = _tensors(operands, norm.arithmetic)
        lie = check_shapes(norm.geometry, operands)
        if operands.mask is not None:
            operands = operands._replace(mask=mask_beside(x, operands.mask))
        offset = check_offset(gamma_offset)
        if offset and operands.gamma is not None:
            operands = operands._replace(gamma=operands.gamma + offset)
        if operands.residual is None and not return_statistics and lie == norm.operands:
            results = [dispatch.choose(norm, x).run(norm, x, operands)]
        else:
            results = _run(norm, x, operands, lie, return_statistics)
        y, *others = results
        y = function(y) if fused is None else y
        return (y, *others) if others else y

    @classmethod
    def statistics(
        cls, x: Tensor, mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """What `return_statistics` adds to the result, of an x that nobody wants normalized."""
        x = keras.ops.convert_to_tensor(x)
        operands = Operands(mask=mask)
        norm = cls.norm(x, operands, **options)
        check_shapes(norm.geometry, operands)
        if mask is not None:
            operands = Operands(mask=mask_beside(x, keras.ops.convert_to_tensor(mask)))
        return composite.mean_and_deviation(norm, x, operands)

    @classmethod
    def _compute_ragged(
        cls,
        x: Tensor,
        *operands: Any,
        epsilon: float,
        activation: Activation,
        gamma_offset: float,
        dtype: DType | None,
        **where: Any,
    ) -> Tensor:
        """The norm of TensorFlow's RaggedTensor, whose inner axes are those of its flat values."""
        set_axes = cls.geometry(x.shape, **where).set_axes
        ragged = x.ragged_rank
        if min(set_axes) <= ragged or any(operand is not None for operand in operands[2:]):
            raise ValueError(
                f"x of shape {tuple(x.shape)} is ragged up to axis {ragged}, and a norm over axis "
                f"{list(set_axes)}, or one with a mask, a residual or statistics to return, needs "
                f"sets of known size; normalize over axes past {ragged}, or pass x.to_tensor() "
                "with a mask"
            )
        options: dict[str, Any] = {"epsilon": epsilon, "activation": activation, "dtype": dtype}
        options["gamma_offset"] = gamma_offset
        axis = [axis - ragged for axis in set_axes]
        y = cls.compute(x.flat_values, *operands[:2], axis=axis, **options)
        return x.with_flat_values(y)


@keras.saving.register_keras_serializable("normwise")
class GroupNorm(_Operation):
    """`group_norm` as a node of a functional model."""

    geometry = staticmethod(geometry.group)


@keras.saving.register_keras_serializable("normwise")
class InstanceNorm(_Operation):
    """`instance_norm` as a node of a functional model."""

    @staticmethod
    def geometry(shape: Shape, axis: Axis) -> Geometry:
        """The geometry of group norm with a group per channel."""
        return geometry.group(shape, axis, geometry.INSTANCE)


@keras.saving.register_keras_serializable("normwise")
class LayerNorm(_Operation):
    """`layer_norm` as a node of a functional model."""


@keras.saving.register_keras_serializable("normwise")
class RMSNorm(_Operation):
    """`rms_norm` as a node of a functional model."""

    subtract_mean = False


@keras.saving.register_keras_serializable("normwise")
class FilterResponseNorm(_Operation):
    """`filter_response_norm` as a node of a functional model."""

    subtract_mean = False
    geometry = staticmethod(geometry.response)


_OPERATIONS = {
    filter_response_norm: FilterResponseNorm,
    group_norm: GroupNorm,
    instance_norm: InstanceNorm,
    layer_norm: LayerNorm,
    rms_norm: RMSNorm,
}


def operation_of(function: Callable[..., Tensor]) -> type[_Operation]:
    """The operation behind one of this module's functions."""
    if function not in _OPERATIONS:
        raise TypeError(f"{function!r} is no norm; pass a function of normwise.ops, or a layer")
    return _OPERATIONS[function]


# Of a tiny norm's time, to make a Norm and its hash would be a good part.
@functools.lru_cache(maxsize=1024, typed=True)
def _norm_of(
    operation: type[_Operation],
    shape: Shape,
    given: DType,
    lie: Operands,
    epsilon: float,
    activation: activations.Activation,
    dtype: DType | None,
    floatx: str | None = None,
    axis_types: tuple[type, ...] = (),
    **where: Any,
) -> Norm:
    """The Norm of an operation's call, with the errors that its options raise."""
    given = check_dtype(given)
    if dtype is None:
        dtype = given if "float" in given else floatx
        if dtype is None:
            raise TypeError("floatx may change from call to call")
    dtype = dtype_name(dtype)
    if "float" not in dtype:
        raise ValueError(
            f"dtype={dtype} cannot hold a normalized value; use a float dtype, as dtype='float32'"
        )
    sets, epsilon = operation.geometry(shape, **where), check_epsilon(epsilon)
    return Norm(sets, given, dtype, epsilon, operation.subtract_mean, activation, lie)


def _run(norm: Norm, x: Tensor, operands: Operands, lie: Operands, statistics: bool) -> list[Any]:
    """The result of a norm whose operands lie so, and what is returned with it."""
    others = []
    norm, operands = _for_each_sample(norm.with_operands(lie), x, operands)
    if None in norm.geometry.shape:
        operands = _fitted(norm, x, operands)
    if operands.residual is not None:
        dtype = sum_dtype(norm.x_dtype, norm.y_dtype)
        if dtype != norm.x_dtype:
            x, norm = keras.ops.cast(x, dtype), dataclasses.replace(norm, x_dtype=dtype)
        if not _adds(norm, x, operands.residual):
            x = composite.summed(x, operands.residual, norm.x_dtype)
            others, operands = [x], operands._replace(residual=None)
            norm = norm.with_operands(norm.operands._replace(residual=None))
    if PER_ELEMENT in norm.operands:
        y = _modulated(norm, x, operands)
    else:
        y = dispatch.choose(norm, x).run(norm, x, operands)
        if operands.residual is not None:
            y, x = y
            others = [x]
    if statistics:
        others += composite.mean_and_deviation(norm, x, operands)
    return [y, *others]


def _adds(norm: Norm, x: Tensor, residual: Tensor) -> bool:
    """Whether the kernel of a norm makes the sum itself."""
    alike = norm.x_dtype == norm.y_dtype == dtype_name(residual.dtype)
    chosen = dispatch.choose(norm, x)
    return alike and PER_ELEMENT not in norm.operands and chosen.adds(norm, x, residual)


def _for_each_sample(norm: Norm, x: Tensor, operands: Operands) -> tuple[Norm, Operands]:
    """The norm and operands with a gamma and a beta for all or for each sample if these say all."""
    expected = norm.geometry.parameter_shape
    for name in ("gamma", "beta"):
        given = getattr(operands, name)
        if getattr(norm.operands, name) == PER_ELEMENT and _is_alike(norm.geometry, given.shape):
            shared = given.shape[0] == 1
            alike = keras.ops.reshape(given, expected if shared else (-1, *expected))
            operands = operands._replace(**{name: alike})
            lies = SHARED if shared else PER_SAMPLE
            norm = norm.with_operands(norm.operands._replace(**{name: lies}))
    lie = norm.operands
    if PER_SAMPLE in lie and SHARED in lie:
        name = "gamma" if lie.gamma == SHARED else "beta"
        shared = getattr(operands, name)
        shape = (keras.ops.shape(x)[0], *shared.shape)
        operands = operands._replace(**{name: keras.ops.broadcast_to(shared, shape)})
        norm = norm.with_operands(lie._replace(**{name: PER_SAMPLE}))
    return norm, operands


def _fitted(norm: Norm, x: Tensor, operands: Operands) -> Operands:
    """The operands of an x of unknown extents, in what these turn out to be: else it is an error.

    Without, one sample would be broadcast to a batch, and so would x to one of the operands'.
    """
    full = keras.ops.shape(x)
    for name in ("gamma", "beta"):
        if getattr(norm.operands, name) == PER_SAMPLE:
            given = getattr(operands, name)
            shape = (full[0], *keras.ops.shape(given)[1:])
            operands = operands._replace(**{name: keras.ops.reshape(given, shape)})
    if operands.residual is not None:
        operands = operands._replace(residual=keras.ops.reshape(operands.residual, full))
    return operands


def _is_alike(geometry: Geometry, shape: Shape) -> bool:
    """Whether what broadcasts to x is a gamma or beta of all samples or of each of them."""
    # An extent of TorchScript's traces is a tensor: to compare it would bind what it stands for.
    known = [extent if isinstance(extent, int) else None for extent in shape]
    return known[0] in (1, geometry.shape[0]) and all(
        extent == (full if axis in geometry.parameter_axes else 1)
        for axis, (extent, full) in enumerate(zip(known, geometry.shape, strict=True))
        if axis > 0
    )


def _modulated(norm: Norm, x: Tensor, operands: Operands) -> Tensor:
    """The norm with a gamma or a beta for each element, which are applied to what kernels give."""
    lie = norm.operands
    bare = norm.with_operands(lie._replace(gamma=None, beta=None))
    bare = dataclasses.replace(bare, y_dtype=norm.arithmetic, activation=activations.IDENTITY)
    y = dispatch.choose(bare, x).run(bare, x, operands._replace(gamma=None, beta=None))
    gamma, beta = (
        each if each is None or how == PER_ELEMENT else composite.spread(each, norm.geometry)
        for each, how in zip(operands[:2], lie, strict=False)
    )
    y = y if gamma is None else y * gamma
    y = y if beta is None else y + beta
    if None in norm.geometry.shape:
        # As in `_fitted`: an error where it is larger than x.
        y = keras.ops.reshape(y, keras.ops.shape(x))
    return keras.ops.cast(norm.activation(y), norm.y_dtype)


def _tensors(operands: Operands, arithmetic: str) -> Operands:
    """The operands as tensors: gamma, beta and learned epsilon of the dtype of the arithmetic."""
    gamma, beta, mask, learned_epsilon, residual = operands
    return Operands(
        _parameter(gamma, arithmetic),
        _parameter(beta, arithmetic),
        mask if mask is None else keras.ops.convert_to_tensor(mask),
        _parameter(learned_epsilon, arithmetic),
        residual if residual is None else keras.ops.convert_to_tensor(residual),
    )


def _parameter(value: Tensor, dtype: str) -> Tensor | None:
    """Gamma or beta as a tensor of this dtype, by a shorter way than Keras's where it is one."""
    if isinstance(value, keras.Variable):
        value = value.value
    if value is None or (keras.ops.is_tensor(value) and dtype_name(value.dtype) == dtype):
        return value
    return keras.ops.convert_to_tensor(value, dtype=dtype)
