"""What weight and spectral norm share: a layer called with kernels that are computed."""

from typing import Any, NamedTuple

import keras
from keras import ops

_TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


class Kernel(NamedTuple):
    """A kernel of a wrapped layer.

    Args:
        owner: the layer that has it: the wrapped one, or its recurrent cell.
        name: the attribute under which it has it.
        variable: the weight.
    """

    owner: keras.Layer
    name: str
    variable: keras.Variable

    @property
    def dtype(self) -> str:
        """The dtype that it is stored in; its own one is another while Keras casts it."""
        return self.owner.variable_dtype

    @property
    def prefix(self) -> str:
        """What tells the weights made for it from those of the layer's other kernel."""
        one_of_two = self.name in ("depthwise_kernel", "pointwise_kernel")
        return self.name.removesuffix("kernel") if one_of_two else ""

    @property
    def depthwise(self) -> bool:
        """Whether it has a set of outputs for every input channel."""
        return self.name == "depthwise_kernel" or isinstance(self.owner, _DEPTHWISE)

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes that tell the kernel's outputs apart, counted from the end."""
        if isinstance(self.owner, _TRANSPOSED):
            return (-2,)
        if self.depthwise:
            return (-2, -1)
        if isinstance(self.owner, keras.layers.EinsumDense):
            operands, output = self.owner.equation.replace(" ", "").split("->")
            letters = operands.split(",")[1]
            return tuple(i - len(letters) for i, letter in enumerate(letters) if letter in output)
        return (-1,)


class KernelWrapper(keras.layers.Wrapper):
    """A layer that is called with kernels computed from its own: the base of both wrappers.

    The wrapped layer is never changed by a call. Keras trains a model on JAX by a function of its
    weights that returns only those that no gradient trains, so a call cannot set a trained weight;
    where an algorithm does, the wrapper keeps the difference in a weight named `..._offset`, and
    the value is the trained weight plus its offset.

    A subclass says in `kernel_names` which kernels it takes and calls `call_with`.
    """

    kernel_names = (("kernel",), ("depthwise_kernel", "pointwise_kernel"))

    def __init__(self, layer: keras.Layer, **kwargs: Any):
        name = type(self).__name__
        if not isinstance(layer, keras.Layer):
            raise TypeError(
                f"layer={layer!r} is no Keras layer; give {name} an instance of one, as in "
                f"{name}(keras.layers.Dense(8))"
            )
        if hasattr(layer, "state_size") and not isinstance(layer, keras.layers.RNN):
            raise ValueError(
                f"{type(layer).__name__} is a recurrent cell, which has to be called step by step; "
                f"wrap the layer that does so, as in {name}(keras.layers.RNN(cell))"
            )
        super().__init__(layer, **kwargs)
        self.supports_masking = layer.supports_masking
        # The wrapped layer casts its inputs, to a dtype of its own.
        self.autocast = False
        # Keras quantizes and adapts the layer without a word to its wrapper.
        self._allow_changes = _refuse_changes(self._owner(), name)

    def _owner(self):
        """The layer that has the kernels."""
        recurrent = isinstance(self.layer, keras.layers.RNN)
        return self.layer.cell if recurrent else self.layer

    def kernels(self) -> list[Kernel]:
        """The kernels that are normalized, in the order in which the layer applies them."""
        recurrent = isinstance(self.layer, keras.layers.RNN)
        owner = self._owner()
        for names in (("recurrent_kernel",),) if recurrent else self.kernel_names:
            found = [getattr(owner, name, None) for name in names]
            if all(_is_plain(variable) for variable in found):
                return [
                    Kernel(owner, name, variable)
                    for name, variable in zip(names, found, strict=True)
                ]
        either = " or ".join(" and ".join(names) for names in self.kernel_names)
        wanted = "a recurrent_kernel" if recurrent else f"a {either}"
        raise ValueError(
            f"{type(owner).__name__} has no weight to normalize: {type(self).__name__} needs "
            f"{wanted} that is a weight of its own, as that of Dense or Conv2D; wrap the inner "
            "layer that has it, without LoRA or quantization"
        )

    def _add_offset(self, name: str, weight, kernel: Kernel):
        """A weight of the kernel's dtype for what a call adds to a trained one."""
        return self.add_weight(
            name=name,
            shape=weight.shape,
            dtype=kernel.dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
        )

    @property
    def compute_dtype(self):
        """That of the norm: the wrapped layer computes in its own one.

        Were it another than that of the weights, Keras would round them before the norm sees them.
        """
        return self.variable_dtype

    def call_with(self, values, inputs, training):
        """Call the wrapped layer as if its weights had other values.

        Args:
            values: a tensor for each weight that is to be another, by the `id` of the weight.
            inputs, training: of the call.
        """
        dtype = self.layer.compute_dtype
        values = {key: ops.cast(value, dtype) for key, value in values.items()}
        changes = {}
        if isinstance(self.layer, keras.layers.RNN):
            changes["cell"] = _twin(self.layer.cell, values)
        return _twin(self.layer, values, **changes)(inputs, training=training)

    @property
    def is_flat(self) -> bool:
        """Whether the wrapped layer computes by itself: one of Keras's, and not by a cell."""
        known = getattr(keras.layers, type(self.layer).__name__, None) is type(self.layer)
        return known and not isinstance(self.layer, keras.layers.RNN)

    def call_precisely(self, inputs, **changes):
        """Call the wrapped layer in the dtype of its weights, whichever it computes in.

        Args:
            inputs: of the call.
            **changes: what is to be another, by the layer's attribute.
        """
        twins = []
        if isinstance(self.layer, keras.layers.RNN):
            changes["cell"] = _twin(self.layer.cell, {})
            twins.append(changes["cell"])
        twins.append(_twin(self.layer, {}, **changes))
        for twin in twins:
            twin.dtype_policy = twin.variable_dtype
        if not self.is_flat:
            return twins[-1](inputs, training=False)
        # `__call__` changes what no branch of torch.cond may.
        dtype = twins[-1].variable_dtype
        convert = twins[-1].dtype_policy.convert_input
        return twins[-1].call(keras.tree.map_structure(lambda x: convert(x, True, dtype), inputs))

    def compute_output_shape(self, input_shape):
        """The output shape of the wrapped layer."""
        return self.layer.compute_output_shape(input_shape)

    def compute_output_spec(self, inputs, training=None):
        """A symbol of the wrapped layer's output."""
        return self.layer.compute_output_spec(inputs)

    def compute_mask(self, inputs, previous_mask):
        """The mask that the wrapped layer makes of its input's."""
        return self.layer.compute_mask(inputs, previous_mask)

    def _release(self):
        """Let the wrapped layer be quantized and adapted again, for `remove`."""
        if not self.built:
            raise ValueError(
                f"{self.name} has no weights to remove the norm from; call it, or build it, first"
            )
        self._allow_changes()

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The wrapper of a config, which may be one that Keras 2 wrote."""
        layer = config["layer"]
        if "module" not in layer and hasattr(keras.layers, layer["class_name"]):
            # Configs older than Keras 2.12 do not say of which module a class is.
            layer = {"module": "keras.layers", "registered_name": None, **layer}
        layer = keras.saving.deserialize_keras_object(layer, custom_objects=custom_objects)
        return cls(**{**config, "layer": layer})


def full_precision(tensor):
    """A tensor in the dtype that the norms compute in: float64 as it is, others in float32."""
    tensor = ops.convert_to_tensor(tensor)
    wide = keras.backend.standardize_dtype(tensor.dtype) == "float64"
    return ops.cast(tensor, "float64" if wide else "float32")


def _is_plain(variable):
    """Whether a kernel is a weight of its own, and one of floats."""
    return isinstance(variable, keras.Variable) and keras.backend.is_float_dtype(variable.dtype)


def _refuse_changes(layer, wrapper):
    """Make a layer refuse to quantize its kernel and to add LoRA to it, until the result's call."""
    names = ("quantize", "enable_lora")
    own = [n for n in names if getattr(type(layer), n, None) is not getattr(keras.Layer, n, None)]
    replaced = {name: getattr(layer, name) for name in own}
    for name, original in replaced.items():
        setattr(layer, name, _refusal(layer, wrapper, name, original))

    def allow():
        for name, original in replaced.items():
            setattr(layer, name, original)

    return allow


def _refusal(layer, wrapper, method, original):
    def refuse(*args, **kwargs):
        given = args[0] if args else next(iter(kwargs.values()), None)
        config = kwargs.get("config")
        given = getattr(config, "mode", None) if given is None else given
        if given == "float8":
            # The kernel stays one of floats.
            return original(*args, **kwargs)
        raise ValueError(
            f"{method}({given!r}) of {layer.name} would take away the kernel of floats from which "
            f"{wrapper} computes another in every call; put the layer that the wrapper's remove() "
            "returns in the wrapper's place first"
        )

    return refuse


def _twin(layer, values, **changes):
    """A layer that shares everything with `layer` but the weights in `values` and `changes`.

    It lives for one call. What a call leaves in it, tracers above all, goes with it, and threads
    that call the same layer at once do not meet.
    """
    twin = object.__new__(type(layer))
    own = vars(layer)
    weights = {name: values[id(value)] for name, value in own.items() if id(value) in values}
    vars(twin).update({**own, **weights, **changes})
    return twin
