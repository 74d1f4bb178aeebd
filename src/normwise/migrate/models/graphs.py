"""Models out of configs of Keras 2: the layers are made, and called as they were."""

import collections
import dataclasses
import weakref

import keras

from normwise import keras_private
from normwise.migrate.models import configs, operations
from normwise.migrate.models.reading.budget import Budget

CONSTANT = "_CONSTANT_VALUE"
# Keras asks a stack of cells for its last cell's states twice, so each level doubles the time.
MAX_HELD = 8
# TensorFlow ends the process at a tensor of more than 254.
MAX_DIMENSIONS = 32


@dataclasses.dataclass(frozen=True)
class Reference:
    """One output of one call of one layer."""

    layer: str
    call: int
    output: int


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer's call in a config: its name, which call of its it is, and with what."""

    layer: str
    index: int
    inputs: object
    options: dict


class Builder:
    """Makes models and layers.

    `layers` tells the layers of a model in the order of its config, by which its weights were
    saved; Keras 3 keeps another order.
    """

    def __init__(self, translator: configs.Translator, budget: Budget):
        self._translator = translator
        self.budget = budget
        self.layers = weakref.WeakKeyDictionary()
        # How many calls one call of a model comes to.
        self._calls = weakref.WeakKeyDictionary()
        # Options that layers get in the end: `stateful` ones keep their state from batch to batch,
        # which is made without it, and `unroll` repeats a cell as often as an input claims.
        self.late = {"stateful": [], "unroll": []}
        self._depth = 0

    def model(self, data: dict) -> keras.Model:
        """A model, or a layer."""
        name = data.get("class_name")
        if unknown := self._translator.unknown(data):
            raise ValueError(configs.missing(list(dict.fromkeys(unknown))))
        made = self.layer(data)
        if not isinstance(made, keras.Model):
            raise ValueError(f"the config is of a {name}, which is no model")
        return made

    def calls(self, layer) -> int:
        """How many calls one call of a layer comes to."""
        return self._calls.get(layer, 1)

    def layer(self, data: dict) -> keras.Layer:
        """A layer, with all that is in it."""
        self.budget.spend("layers")
        if not isinstance(data, dict):
            raise ValueError(f"a layer is {data!r:.80}; expected a JSON object")
        if not isinstance(config := data.get("config"), dict):
            raise ValueError(f"the layer {data.get('class_name')} has no config")
        is_own = self._translator.is_own(data)
        if "input_layers" in config and "layers" in config:
            return self._functional(data, config)
        if data.get("class_name") == "Sequential" and not is_own:
            return self._sequential(data, config)
        if data.get("class_name") == "InputLayer":
            return _input(config)
        cls = self._translator.class_of(data)
        if cls is None:
            raise ValueError(configs.missing([str(data.get("class_name"))]))
        if cls is keras.layers.Lambda:
            return self._lambda(config)
        options = self._translator.options(data, cls)
        if is_own:
            return cls.from_config(options)
        self._depth += 1
        if self._depth > MAX_HELD:
            raise ValueError(f"its layers hold each other more than {MAX_HELD} deep")
        held = []
        for key in configs.NESTED:
            if isinstance(inner := config.get(key), list):
                options[key] = [self.layer(each) for each in inner]
                held += options[key]
            elif inner is not None:
                options[key] = self.layer(inner)
                held.append(options[key])
        self._depth -= 1
        late = [layers for key, layers in self.late.items() if options.pop(key, False)]
        layer = cls(**options)
        for layers in late:
            layers.append(layer)
        self._calls[layer] = 1 + sum(map(self.calls, held))
        return layer

    def _lambda(self, config: dict) -> keras.Layer:
        """A layer around a function: the user's by its name, or one whose code is in the file."""
        function = config.get("function")
        named = config.get("function_type") == "function" and not isinstance(function, list)
        if not named and self._translator.safe_mode:
            raise ValueError(
                f"the layer {config.get('name')} is a Lambda, whose code is in the file and would "
                "run; pass safe_mode=False if you trust the file"
            )
        if isinstance(function, list):
            keys = ("code", "defaults", "closure")
            function = {
                "class_name": "__lambda__",
                "config": dict(zip(keys, function, strict=True)),
            }
        elif named:
            function = self._translator.function(function)
        options = {
            "name": _name(config),
            "function": function,
            "output_shape": config.get("output_shape"),
            "arguments": config.get("arguments") or {},
            "dtype": configs.dtype_name(config.get("dtype")),
        }
        return keras.layers.Lambda.from_config(options, safe_mode=self._translator.safe_mode)

    def _sequential(self, data: dict, config: dict) -> keras.Model:
        layers = [self.layer(each) for each in _listed_layers(config)]
        calls = sum(map(self.calls, layers))
        self.budget.spend("calls", calls)
        if layers and not isinstance(layers[0], keras.layers.InputLayer | keras.Model):
            shape = (
                _shape(config["layers"][0]["config"].get("batch_input_shape"))
                or _shape(config.get("build_input_shape"))
                or _shape((data.get("build_config") or {}).get("input_shape"))
            )
            if shape:
                layers.insert(0, keras.Input(batch_shape=(None, *shape[1:])))
        model = keras.Sequential(layers, name=_name(config))
        if model.built:
            _checked(keras.tree.flatten([each.output for each in model.layers]))
        self.layers[model] = [each for each in layers if isinstance(each, keras.Layer)]
        self._calls[model] = calls
        return model

    def _functional(self, data: dict, config: dict) -> keras.Model:
        graph = _Graph(config, self)
        inputs = graph.tensors(config["input_layers"])
        outputs = graph.tensors(config["output_layers"])
        cls = keras.Model
        if self._translator.is_own(data):
            cls = self._translator.class_of(data)
        model = cls(inputs=inputs, outputs=outputs, name=_name(config))
        self.layers[model] = graph.layers
        self._calls[model] = graph.calls
        return model


def _checked(tensors: list) -> list:
    """Tensors, unless one has more dimensions than any framework makes."""
    for each in tensors:
        if len(each.shape) > MAX_DIMENSIONS:
            raise ValueError(
                f"it makes a tensor of {len(each.shape):,} dimensions; at most {MAX_DIMENSIONS} "
                "are built"
            )
    return tensors


def _listed_layers(config: dict) -> list[dict]:
    if not isinstance(layers := config.get("layers"), list):
        raise ValueError("the layers of a model are no list")
    return layers


def _name(config: dict) -> str | None:
    name = config.get("name")
    return name.replace("/", "_") if isinstance(name, str) else None


def _shape(saved) -> list | None:
    """A shape in JSON; a TensorShape is a dict."""
    if isinstance(saved, dict):
        saved = saved.get("items")
    is_shape = isinstance(saved, list) and all(each is None or type(each) is int for each in saved)
    return saved if is_shape else None


class _Graph:
    """The calls of a functional model, made one after the other as their inputs come to be."""

    def __init__(self, config: dict, builder: Builder):
        self._builder = builder
        self.calls = 0
        self._made = {}
        self._outputs = {}
        self._nested = set()
        calls = []
        for data in _listed_layers(config):
            calls += self._add(data)
        self._first_calls = self._find_first_calls(config)
        self._run(calls)

    @property
    def layers(self) -> list[keras.Layer]:
        """The layers in the order of the config; a function of TensorFlow is none."""
        return [layer for layer in self._made.values() if isinstance(layer, keras.Layer)]

    def _add(self, data: dict) -> list[Call]:
        """Make a layer, and list its calls."""
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
            raise ValueError(f"a layer is {data!r:.80}; expected a JSON object with a config")
        config = data["config"]
        name = data.get("name", config.get("name"))
        if not isinstance(name, str) or name in self._made:
            raise ValueError(f"a model has two layers named {name!r}, or one without a name")
        class_name = data.get("class_name")
        if class_name in configs.CALLS:
            self._made[name] = operations.find(config)
        else:
            made = self._made[name] = self._builder.layer(data)
            if isinstance(made, keras.layers.InputLayer):
                self._outputs[name, 0] = [made.output]
            elif isinstance(made, keras.Model):
                self._nested.add(name)
        return [
            Call(name, index, *_arguments(node))
            for index, node in enumerate(data.get("inbound_nodes") or [])
        ]

    def _find_first_calls(self, config: dict) -> dict[str, int]:
        """The number of each nested model's first call in references to it.

        Keras 2 counts from 1 where a model's own input was its first call.
        """
        ends = [config["input_layers"], config["output_layers"]]
        calls = [layer.get("inbound_nodes") for layer in config["layers"]]
        first = {}
        for reference in _references(ends + calls):
            if reference.layer in self._nested:
                first[reference.layer] = min(
                    reference.call, first.get(reference.layer, reference.call)
                )
        return first

    def _run(self, calls: list[Call]) -> None:
        """Make every call once its inputs are there, whatever the order of the config."""
        ready, waiting = collections.deque(calls), collections.defaultdict(list)
        while ready:
            call = ready.popleft()
            absent = next((key for key in self._needs(call) if key not in self._outputs), None)
            if absent is not None:
                waiting[absent].append(call)
                continue
            key = (call.layer, call.index)
            self._outputs[key] = _checked(keras.tree.flatten(self._make(call)))
            ready.extend(waiting.pop(key, ()))
        if waiting:
            (layer, call), blocked = next(iter(waiting.items()))
            raise ValueError(
                f"the layer {blocked[0].layer} waits for call {call} of {layer!r}, which never is"
            )

    def _needs(self, call: Call):
        for reference in _references([call.inputs, call.options]):
            yield self._key(reference)

    def _key(self, reference: Reference) -> tuple[str, int]:
        return reference.layer, reference.call - self._first_calls.get(reference.layer, 0)

    def tensors(self, structure):
        """What a structure of references, as the outputs of a model, stands for."""
        return _unnested(self._resolve(_parsed(structure)))

    def _resolve(self, structure):
        if isinstance(structure, Reference):
            outputs = self._outputs.get(self._key(structure), [])
            if not 0 <= structure.output < len(outputs):
                raise ValueError(
                    f"the model needs output {structure.output} of call {structure.call} of "
                    f"{structure.layer!r}, which there is not"
                )
            return outputs[structure.output]
        if isinstance(structure, list):
            return [self._resolve(each) for each in structure]
        if isinstance(structure, dict):
            return {key: self._resolve(each) for key, each in structure.items()}
        return structure

    def _make(self, call: Call):
        target = self._made[call.layer]
        calls = self._builder.calls(target)
        self._builder.budget.spend("calls", calls)
        self.calls += calls
        inputs = _unnested(self._resolve(call.inputs))
        options = self._resolve(call.options)
        if not isinstance(target, keras.Layer):
            options.pop("name", None)
            return operations.call(target, inputs, options, self._builder.budget)
        options = {key: value for key, value in options.items() if value is not None}
        is_recurrent = isinstance(target, keras.layers.RNN | keras.layers.Bidirectional)
        if is_recurrent and isinstance(inputs, list):
            # Keras 2 hands the initial state over as further inputs.
            inputs, *options["initial_state"] = inputs
        if "initial_state" in options:
            # Keras 3 passes a mask on to layers of one input only.
            options.setdefault("mask", keras_private.mask_of(inputs))
        return target(inputs, **options)


def _input(config: dict) -> keras.layers.InputLayer:
    if config.get("ragged"):
        raise ValueError(
            f"the input {config.get('name')} is ragged, which Keras 3 knows not; pad the data, "
            "and save the model with a dense input"
        )
    shape = _shape(config.get("batch_input_shape", config.get("batch_shape")))
    if shape is None:
        raise ValueError(f"the input {config.get('name')} has no shape")
    made = keras.layers.InputLayer(
        batch_shape=shape,
        dtype=configs.dtype_name(config.get("dtype")),
        sparse=bool(config.get("sparse")),
        name=_name(config),
    )
    _checked([made.output])
    return made


def _arguments(node):
    """The first argument of a call, and the others by name: they hang on every reference."""
    options = {}
    inputs = _parsed(node, options)
    return inputs, {key: _parsed(value) for key, value in options.items()}


def _is_reference(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and type(value[1]) is int
        and (type(value[2]) is int or value[0] == CONSTANT)
    )


def _parsed(value, options=None):
    """A value with the references in it told from lists; what hangs on them goes to `options`."""
    if _is_reference(value):
        if options is not None and len(value) == 4 and isinstance(value[3], dict):
            options.update(value[3])
        return value[2] if value[0] == CONSTANT else Reference(*value[:3])
    if isinstance(value, list):
        return [_parsed(each, options) for each in value]
    if isinstance(value, dict):
        return {key: _parsed(each, options) for key, each in value.items()}
    return value


def _references(structure):
    """Every reference in a structure, in the form of the config or parsed."""
    todo = [structure]
    while todo:
        each = todo.pop()
        if isinstance(each, Reference):
            yield each
        elif _is_reference(each) and each[0] != CONSTANT:
            yield Reference(*each[:3])
            todo += each[3:]
        elif isinstance(each, list):
            todo += each
        elif isinstance(each, dict):
            todo += each.values()


def _unnested(structure):
    """A structure of one tensor in a list is that tensor, as Keras 2 has it."""
    if isinstance(structure, list) and len(structure) == 1:
        return structure[0]
    return structure
