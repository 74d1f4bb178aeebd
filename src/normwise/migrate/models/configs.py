"""Configs of Keras 2 in the words of Keras 3: classes, dtypes, options."""

import inspect
from pathlib import Path

import keras

import normwise

# Options that Keras 3 has no more: those that only said how to compute the same, and the values of
# the others that ask for what Keras 3 does anyway. An option that is null asks for nothing.
LEFTOVERS = (
    *("batch_input_shape", "build_input_shape", "dtype_policy", "enable_caching_device"),
    *("experimental_autocast", "fused", "implementation", "input_length", "key_shape"),
    *("query_shape", "renorm_clipping", "renorm_momentum", "trainable", "value_shape", "_use_gpu"),
)
NEUTRAL = {
    "groups": 1,
    **dict.fromkeys(("dynamic", "ragged", "renorm", "sparse", "time_major"), False),
}
# A separable or depthwise convolution carries these of its base class, and never used them.
UNUSED = ("filters", "kernel_initializer", "kernel_regularizer", "kernel_constraint")
RENAMED = {("LeakyReLU", "alpha"): "negative_slope", ("ThresholdedReLU", "theta"): "threshold"}
# The options of layers that hold other layers.
NESTED = ("layer", "backward_layer", "cell", "cells")
# The classes of models in Keras 3, and of the layers that stand for TensorFlow's functions.
GRAPHS = {"Functional": "Model", "Model": "Model", "Sequential": "Sequential"}
CALLS = ("TFOpLambda", "SlicingOpLambda")
# Classes that are others now; Keras 3's LayerNormalization is right on the last axis only, on some
# backends.
REPLACED = {
    "LayerNormalization": normwise.layers.LayerNormalization,
    "SyncBatchNormalization": keras.layers.BatchNormalization,
    "ThresholdedReLU": keras.layers.ReLU,
}
# The layers of Keras 2.15. No file of it names another honestly: Keras 3's run programs of other
# frameworks, or make gigabytes of a number.
LAYERS = frozenset(Path(__file__).with_name("keras2_layers.txt").read_text().split())

NAMESPACES = {
    "initializer": keras.initializers,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
    "layer": keras.layers,
}


class Translator:
    """Translates configs, with the classes and functions of the user's own."""

    def __init__(self, custom_objects=None, safe_mode=True):
        self._custom = dict(custom_objects or {})
        self.safe_mode = safe_mode

    def class_of(self, data: dict) -> type | None:
        """The class of a serialized layer, or None where there is none of its name."""
        name, registered = _names(data)
        if (own := self._own(registered)) is not None:
            return own
        if ">" in registered or not _of_keras(data.get("module")):
            return None
        if name in REPLACED:
            return REPLACED[name]
        return _found(keras.layers, name)

    def is_own(self, data: dict) -> bool:
        """Whether a serialized layer is of a class of the user's, or of one registered."""
        own = self._own(_names(data)[1])
        return own is not None and not own.__module__.startswith("normwise.")

    def _own(self, name: str):
        found = self._custom.get(name, self._custom.get(name.rpartition(">")[2]))
        return keras.saving.get_registered_object(name) if found is None else found

    def scope(self):
        """Where Keras finds the user's classes under the names that the configs have."""
        return keras.saving.custom_object_scope(self._custom)

    def options(self, data: dict, cls: type) -> dict:
        """The arguments for a layer's class out of its config."""
        name, _ = _names(data)
        kept = () if self.is_own(data) else NESTED
        config = {
            key: value if key in kept else self._value(key, value)
            for key, value in _config(data).items()
        }
        config = {RENAMED.get((name, key), key): value for key, value in config.items()}
        if isinstance(config.get("name"), str):
            # Keras 3 builds paths of the names.
            config["name"] = config["name"].replace("/", "_")
        if name == "SyncBatchNormalization":
            config["synchronized"] = True
        if isinstance(axis := config.get("axis"), list) and cls is keras.layers.BatchNormalization:
            (config["axis"],) = axis
        if name == "InstanceNormalization":
            # Which were the channels of the input, by then.
            config.pop("groups", None)
        if cls is normwise.layers.SpectralNormalization:
            config = {"compatible": True, **config}
        if self.is_own(data):
            return config
        if self.safe_mode and isinstance(config.get("vocabulary"), str):
            raise ValueError(
                f"the layer {config.get('name')} reads its vocabulary from the file "
                f"{config['vocabulary']!r}; pass safe_mode=False if you trust it"
            )
        return _without_leftovers(config, cls, name)

    def _value(self, key: str, value):
        """A value of a config, with what is serialized in it as Keras 3 wants it."""
        if key == "dtype":
            return dtype_name(value)
        if isinstance(value, list):
            return [self._value(key, each) for each in value]
        if isinstance(value, str) and key.endswith("activation"):
            return self.function(value)
        if not isinstance(value, dict):
            return value
        if "class_name" in value:
            return self._object(key, value)
        return {name: self._value(name, each) for name, each in value.items()}

    def _object(self, key: str, value: dict):
        name, registered = _names(value)
        if name == "function":
            return self.function(value.get("config"))
        inner = self._value(key, _config(value))
        if self._own(registered) is not None:
            return {**_serialized(None, registered, inner), "registered_name": registered}
        if name in GRAPHS and _of_keras(value.get("module")):
            return _serialized("keras", GRAPHS[name], inner)
        namespace = NAMESPACES.get(key.rpartition("_")[2])
        for each in (namespace,) if namespace else NAMESPACES.values():
            found = _found(each, name) if _of_keras(value.get("module")) else None
            if found is not None:
                if found is keras.layers.Lambda and self.safe_mode:
                    raise ValueError(
                        "a layer of your own holds a Lambda, whose code is in the file and would "
                        "run; pass safe_mode=False if you trust the file"
                    )
                if each is not keras.layers:
                    inner = _accepted(inner, found)
                return _serialized(each.__name__, name, inner)
        raise ValueError(missing([registered]))

    def function(self, name):
        """A function by its name, as Keras 3 wants it in a config."""
        if isinstance(name, dict):
            name = name.get("config")
        if not isinstance(name, str):
            raise ValueError(f"a function is named {name!r}; expected a text")
        if name in self._custom or keras.saving.get_registered_object(name) is not None:
            return {**_serialized(None, "function", name), "registered_name": name}
        if name == "hard_sigmoid":
            raise ValueError(
                "the activation hard_sigmoid of Keras 2 is clip(0.2 * x + 0.5, 0, 1), and of Keras "
                "3 another; pass custom_objects={'hard_sigmoid': ...}, a function of your own"
            )
        if not self._is_function(name):
            raise ValueError(missing([name]))
        return name

    def unknown(self, value, key: str = "") -> list[str]:
        """The names of all classes and functions in a config that nobody here knows."""
        if isinstance(value, str) and key.endswith("activation"):
            return [] if self._is_function(value) else [value]
        if isinstance(value, list):
            return [name for each in value for name in self.unknown(each, key)]
        if not isinstance(value, dict) or key == "dtype":
            return []
        found = [] if self._is_known(value) else [_names(value)[1]]
        for inner, each in value.items():
            found += self.unknown(each, inner)
        return found

    def _is_known(self, data: dict) -> bool:
        if "class_name" not in data or "config" not in data:
            return True
        name, registered = _names(data)
        if name == "function":
            return self._is_function(data["config"])
        if self._own(registered) is not None:
            return True
        if not _of_keras(data.get("module")):
            return False
        found = (_found(namespace, name) for namespace in NAMESPACES.values())
        return name in (*GRAPHS, *CALLS, *REPLACED) or any(found)

    def _is_function(self, name) -> bool:
        return isinstance(name, str) and (
            name in self._custom
            or keras.saving.get_registered_object(name) is not None
            or hasattr(keras.activations, name)
        )


def _found(namespace, name: str) -> type | None:
    """A class of Keras 3 that Keras 2 may have had."""
    found = getattr(namespace, name, None)
    is_class = isinstance(found, type) and (namespace is not keras.layers or name in LAYERS)
    return found if is_class else None


def missing(names: list[str]) -> str:
    """What to do about classes and functions that nobody here knows."""
    objects = ", ".join(f"{name.rpartition('>')[2]!r}: ..." for name in names)
    return (
        f"{', '.join(names)}: of neither Keras 3 nor normwise; pass custom_objects={{{objects}}} "
        "with your own"
    )


def _names(data: dict) -> tuple[str, str]:
    """A class's name, and the one that it is registered under, which may be the same."""
    name = data.get("class_name")
    registered = data.get("registered_name") or name
    if not isinstance(name, str) or not isinstance(registered, str):
        raise ValueError(f"a class is named {name!r}; expected a text")
    return name.rpartition(">")[2], registered


def _config(data: dict) -> dict:
    config = data.get("config")
    if not isinstance(config, dict):
        raise ValueError(
            f"the config of {data.get('class_name')} is {config!r:.80}; expected a JSON object"
        )
    return config


def _of_keras(module) -> bool:
    return module is None or (isinstance(module, str) and module.split(".")[0] == "keras")


def _serialized(module, class_name, config) -> dict:
    return {
        "module": module,
        "class_name": class_name,
        "config": config,
        "registered_name": None,
    }


def dtype_name(saved):
    """The name of a dtype or of a policy of Keras 2; None for Keras's default."""
    if isinstance(saved, dict):
        saved = saved.get("config", {}).get("name")
    if saved is not None and not isinstance(saved, str):
        raise ValueError(f"a dtype is {saved!r}; expected a text")
    return None if saved == "_infer" else saved


def _parameters(cls: type) -> set[str]:
    """The names of the arguments that a class and its bases take."""
    names = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters
        names |= set(parameters)
        if all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
            break
    return names - {"self", "args", "kwargs"}


def _accepted(config: dict, cls: type) -> dict:
    parameters = _parameters(cls)
    return {key: value for key, value in config.items() if key in parameters}


def _is_harmless(key: str, value) -> bool:
    is_neutral = key in NEUTRAL and value == NEUTRAL[key]
    return value is None or is_neutral or key in LEFTOVERS or key in UNUSED


def _without_leftovers(config: dict, cls: type, name: str) -> dict:
    kept = {}
    parameters = _parameters(cls)
    for key, value in config.items():
        if key in parameters:
            kept[key] = value
        elif not _is_harmless(key, value):
            raise ValueError(
                f"the layer {config.get('name')} has the option {key}={value!r:.80} of Keras 2's "
                f"{name}, which Keras 3 has not; pass custom_objects={{{name!r}: ...}}, a class of "
                "your own"
            )
    return kept
