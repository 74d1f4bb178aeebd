"""What a file of Keras 2 holds, whatever its format: a config, and arrays by layer."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Node:
    """The arrays of one object, and the objects inside it, by the names of their attributes.

    Keras 2's `.weights.h5` numbers the arrays ("0", "1"); a checkpoint names them ("kernel"). An
    object may be in several others, and in itself.

    Args:
        is_empty: whether there is no array in it, nor in what it holds.
    """

    variables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    children: dict[str, "Node"] = dataclasses.field(default_factory=dict)
    is_empty: bool = True


@dataclasses.dataclass(frozen=True)
class Group:
    """The arrays of one layer and of all that is in it, in order, as the legacy `.h5` has them."""

    name: str
    arrays: list[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A model as it lies in a file.

    Args:
        weights: groups in the order of the layers (`.h5`), or a tree of objects.
        config: the model's config, as the file has it; None where it holds weights alone.
        training: what the model was compiled with, or None.
        version: of the Keras that wrote it.
        file_bytes: the size of the file, or of the files of a folder together.
    """

    weights: list[Group] | Node
    config: dict | None
    training: dict | None
    version: str | None
    file_bytes: int
