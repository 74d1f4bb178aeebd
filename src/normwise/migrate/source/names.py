"""What the names of TensorFlow Addons are called now: here, in Keras 3, or nowhere."""

from importlib import resources
from typing import NamedTuple

OLD_PACKAGE, NEW_PACKAGE = "tensorflow_addons", "normwise"
REGISTERED = "Addons>"  # before the names that its layers have in saved models


class Successor(NamedTuple):
    """What replaces a name of TensorFlow Addons.

    Args:
        name: what to use now, as `normwise.layers.TLU` or `keras.optimizers.Lamb`; None if neither
            package has it.
        note: what differs, or what to do instead; may be empty.
    """

    name: str | None
    note: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether a reference can be rewritten: same arguments, same defaults."""
        return self.name is not None and self.name.startswith("normwise.")


# The modules that define what normwise has. People import from these, too.
_HOMES = {
    "layers.normalizations": (
        "FilterResponseNormalization",
        "GroupNormalization",
        "InstanceNormalization",
    ),
    "layers.spectral_normalization": ("SpectralNormalization",),
    "layers.tlu": ("TLU",),
    "layers.wrappers": ("WeightNormalization",),
    "rnn.layer_norm_lstm_cell": ("LayerNormLSTMCell",),
    "rnn.layer_norm_simple_rnn_cell": ("LayerNormSimpleRNNCell",),
}

_MOVED_NOTES = {
    "SpectralNormalization": "compatible=True trains by the old arithmetic",
    "WeightNormalization": "only a call in training takes its data to initialize",
}
MOVED = {
    f"{package}.{name}": Successor(f"normwise.{package}.{name}", _MOVED_NOTES.get(name, ""))
    for package, names in ((home.partition(".")[0], names) for home, names in _HOMES.items())
    for name in names
}

# An import of one of these that nothing refers to is there to register layers; normwise's does so.
REGISTERING_MODULES = frozenset({"", "layers", "rnn", *_HOMES})


def table(name: str) -> dict[str, Successor]:
    """Old names and their successors, as a file beside this one lists them."""
    lines = resources.files(__package__).joinpath(name).read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines[1:])
    return {old: Successor(new or None, note) for old, new, note in rows}


_OTHERS = table("addons.tsv")
IN_KERAS = {old: known for old, known in _OTHERS.items() if known.name is not None}
NOWHERE = {old: known.note for old, known in _OTHERS.items() if known.name is None}
_SUCCESSORS = MOVED | _OTHERS
MODULES = REGISTERING_MODULES | {old.partition(".")[0] for old in _SUCCESSORS if "." in old}


def successor(path: str) -> Successor | None:
    """What replaces `path`, a name below the old package; None for what is no name of its.

    >>> successor("layers.TLU")
    Successor(name='normwise.layers.TLU', note='')
    >>> successor("layers.tlu.TLU") == successor("layers.TLU")
    True
    """
    parts = path.split(".")
    if len(parts) == 3:
        # By the module that defines it, as no attribute of a class is called like another name.
        path = f"{parts[0]}.{parts[2]}"
    return _SUCCESSORS.get(path)


def registered(name: str) -> Successor | None:
    """What replaces the object that saved models call `Addons>name`.

    >>> registered("LAMB").name
    'keras.optimizers.Lamb'
    """
    found = (each for old, each in _SUCCESSORS.items() if old.rpartition(".")[2] == name)
    return next(found, None)
