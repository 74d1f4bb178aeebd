"""What Keras 3 refuses of the source that runs on Keras 2, with what takes its place.

In a functional model the functions of TensorFlow, and those of the old backend, get no tensors but
KerasTensors, which they refuse (seen in TensorFlow 2.21 with Keras 3.15). Elsewhere they work on.
"""

import re

from normwise.migrate.source.names import Successor, table
from normwise.migrate.source.references import Finding, Lines, binders_of
from normwise.migrate.source.scopes import Scopes

_REFUSED = table("keras2.tsv")
# Those of the functions are refused only where a layer is not yet called.
ON_TENSORS = {
    old: known for old, known in _REFUSED.items() if known.note == "in a functional model"
}
GONE = {old: known for old, known in _REFUSED.items() if old not in ON_TENSORS}
# Of these modules everything has its name elsewhere.
_MODULES = ("keras.layers", "keras.optimizers")


def find_hints(scopes: Scopes, lines: Lines) -> list[Finding]:
    """Every place of a module that names what Keras 3 refuses."""
    hints = []
    for each in scopes.imports:
        if (found := _refused(each.path, GONE)) is not None:
            hints.append(Finding(*lines.position(each.alias), *found))
    for use in scopes.uses:
        meanings = {each and each.stands_for for each in binders_of(use.context.scope, use.node.id)}
        if len(meanings) != 1 or None in meanings or _refused(root := meanings.pop(), GONE):
            continue  # Unclear, or listed where it is imported.
        path = ".".join([root, *(each.attr for each in use.attributes)])
        refused = GONE if use.context.is_method else _REFUSED
        if (found := _refused(path, refused)) is not None:
            hints.append(Finding(*lines.position(use.node), *found))
    return hints


def _refused(path: str, known: dict[str, Successor]) -> tuple[str, str | None, str] | None:
    """A name of a table that a dotted one begins with, what replaces it, and how."""
    path = path.removeprefix("tensorflow.") if ".keras." in path else path
    parts = re.sub(r"^tensorflow\b", "tf", path).split(".")
    for count in range(2, len(parts) + 1):
        old = ".".join(parts[:count])
        if old in known:
            name, note = known[old]
            if name in _MODULES and len(parts) > count:
                return f"{old}.{parts[count]}", f"{name}.{parts[count]}", note
            return old, name, note
    return None
