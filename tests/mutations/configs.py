"""Mutations of the configs of models, which are JSON."""

import contextlib
import json

from mutations.raw import truncate

HOSTILE_NUMBERS = (
    *(-(2**63), -(2**31), -1, 0, 1, 2, 2**15, 2**24, 2**31 - 1, 2**31, 2**40, 2**63, 2**70),
    *(-0.5, 1e-300, 1e308, float("nan"), float("inf")),
)
# Each would leave a file behind if it ran.
_CODE = "__import__('pathlib').Path('ran').touch()"
HOSTILE_OBJECTS = (
    {"class_name": "__lambda__", "config": {"value": _CODE}},
    {"class_name": "function", "module": "os", "config": "system", "registered_name": "system"},
    {"class_name": "Popen", "module": "subprocess", "config": {"args": ["touch", "ran"]}},
    {"class_name": "__tensor__", "config": {"value": [1.0], "dtype": "float32"}},
    {"class_name": "__numpy__", "config": {"value": [[1.0], [2.0, 3.0]], "dtype": "O"}},
    {"class_name": "Lambda", "config": {"name": "l", "function": [_CODE, None, None]}},
)
HOSTILE_VALUES = (
    *HOSTILE_NUMBERS,
    *HOSTILE_OBJECTS,
    *(None, True, "", "a" * 65536, "../../x", "\0", "\ud800", "ragged"),
    *([], {}, [[]], [None] * 3, [2**31] * 8, [1] * 5000, [-1, 0], {"config": {}}),
)
CLASSES = (
    *("Dense", "LSTM", "GRU", "RNN", "Embedding", "Conv1D", "Conv3DTranspose", "SeparableConv2D"),
    *("Lambda", "TFOpLambda", "SlicingOpLambda", "Bidirectional", "TimeDistributed"),
    *("Sequential", "Functional", "Model", "InputLayer", "UpSampling2D", "ZeroPadding2D"),
    *("Addons>GroupNormalization", "Addons>SpectralNormalization", "Addons>WeightNormalization"),
    *("Addons>LayerNormLSTMCell", "Addons>TLU", "Addons>NoSuchLayer", "os>system", "subprocess"),
    *("StringLookup", "TextVectorization", "Resizing", "Permute", "Reshape", "Flatten", "Dot"),
)


def mutate(text: bytes, rng) -> tuple[bytes, str]:
    """Change the text of a config, or what it says."""
    if rng.random() < 0.15:
        change = rng.choice(TEXTS)
        return change(text, rng), change.__name__
    try:
        config = json.loads(text)
    except ValueError:
        return truncate(text, rng), truncate.__name__
    changes = [rng.choice(VALUES) for _ in range(rng.choice([1, 1, 1, 3]))]
    for change in changes:
        change(config, rng)
    return json.dumps(config).encode(), "+".join(change.__name__ for change in changes)


def nest_text(text, rng):
    deep = rng.choice([100, 100_000])
    return b'{"config": ' * deep + text + b"}" * deep


def close_early(text, rng):
    return text[: rng.randrange(len(text))]


def break_utf8(text, rng):
    at = rng.randrange(len(text))
    return text[:at] + rng.choice([b"\xff", b"\xc0\x80", b"\xef\xbb\xbf", b"\0"]) + text[at:]


def long_number(text, rng):
    return text.replace(b"10", b"1" * rng.choice([400, 10_000]), 1)


def repeat_keys(text, rng):
    return b'{"class_name": "Dense", "config": {}, ' + text[1:]


def other_text(text, rng):
    return rng.choice([b"", b"null", b"[]", b"{}", b"3", b'"text"', b"[" * 100_000, b"{" * 10])


TEXTS = (nest_text, close_early, break_utf8, long_number, repeat_keys, other_text)


def change_number(config, rng):
    _change(
        config, rng, lambda v: isinstance(v, (int, float)), lambda _: rng.choice(HOSTILE_NUMBERS)
    )


def change_value(config, rng):
    _change(config, rng, lambda v: True, lambda _: rng.choice(HOSTILE_VALUES))


def rename_class(config, rng):
    for holder, key, _ in _sample(config, rng, lambda holder, key, v: key == "class_name"):
        holder[key] = rng.choice(CLASSES)
        holder.pop("registered_name", None)


def change_module(config, rng):
    for holder, key, _ in _sample(config, rng, lambda holder, key, v: key == "module"):
        holder[key] = rng.choice(["os", "subprocess", "builtins", "keras", "../x", "", None, 3])


def remove_value(config, rng):
    for holder, key, _ in _sample(config, rng, lambda *_: True):
        del holder[key]


def repeat_value(config, rng):
    for holder, key, value in _sample(config, rng, lambda h, k, v: isinstance(h, list)):
        holder[key:key] = [value] * rng.choice([1, 2, 50])


def swap_values(config, rng):
    found = list(places(config))
    (first, key, value), (second, other_key, other) = (rng.choice(found) for _ in range(2))
    with contextlib.suppress(IndexError, KeyError):
        first[key], second[other_key] = _copy(other), _copy(value)


def nest_value(config, rng):
    for holder, key, value in _sample(config, rng, lambda *_: True):
        for _ in range(rng.choice([1, 5, 200])):
            value = [value] if rng.random() < 0.5 else {"class_name": "Dense", "config": value}
        holder[key] = value


def misspell_key(config, rng):
    for holder, key, value in _sample(config, rng, lambda h, k, v: isinstance(h, dict)):
        del holder[key]
        holder[key + rng.choice(["s", "_", "\0"])] = value


def widen_shapes(config, rng):
    """Every integer of one name alike, so that shapes that must agree still do."""
    named = [key for _, key, value in places(config) if type(value) is int and type(key) is str]
    if named:
        name, number = rng.choice(sorted(named)), rng.choice(HOSTILE_NUMBERS)
        for holder, key, _ in list(places(config)):
            if key == name:
                holder[key] = number


VALUES = (
    *(change_number, change_number, change_number, change_value, change_value, rename_class),
    *(change_module, remove_value, repeat_value, swap_values, nest_value, misspell_key),
    *(widen_shapes,),
)


def _copy(value):
    return json.loads(json.dumps(value))


def places(config):
    """Every value in a config, as the dict or list that holds it, the key in that, and itself."""
    if isinstance(config, (dict, list)):
        pairs = config.items() if isinstance(config, dict) else enumerate(config)
        for key, value in list(pairs):
            yield config, key, value
            yield from places(value)


def _sample(config, rng, wanted):
    """At most one place that is wanted."""
    found = [place for place in places(config) if wanted(*place)]
    return rng.sample(found, min(1, len(found)))


def _change(config, rng, wanted, made):
    for holder, key, value in _sample(config, rng, lambda h, k, v: wanted(v)):
        holder[key] = _copy(made(value))
