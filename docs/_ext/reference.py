"""The reference from the docstrings: signatures as the source writes them, and the house's dialect.

A docstring of this project is plain text first. Here it becomes reStructuredText: what is indented
after an empty line is shown as it is, `Numerics:` and its like are headings in a line, and signs
that mean something in reStructuredText and nothing in ours are escaped.
"""

import ast
import dataclasses
import inspect
import re
import textwrap

# What a docstring calls by its file, the site has as a page.
FILE = re.compile(r"\bdocs/(\w+)\.md\b")
# What a function says of its module, whose docstring has a page.
MODULE = re.compile(r"\b(see|as) the module\b")
HEADED = re.compile(r"^(Input|Output|Numerics|References?|Weights|Units)(, [^:]*)?: ")
# The house's types, of normwise.typing.
TYPES = re.compile(
    r"(?<![\w.])(Tensor|DType|Shape|Axis|Activation|Initializer|Regularizer|Constraint)\b"
)
# Methods that Keras calls, and nobody else.
CALLED_BY_KERAS = {
    "build",
    "compute_mask",
    "compute_output_shape",
    "compute_output_spec",
    "from_config",
    "get_build_config",
    "get_config",
    "normalize",
    "quantize",
    "set_model",
    "set_params",
}


def setup(app):
    """Hook the two into autodoc."""
    app.connect("autodoc-process-signature", signature)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", docstring, priority=400)
    app.connect("autodoc-skip-member", skip)
    app.connect("source-read", trim)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def signature(app, what, name, obj, options, given, returned):
    """Write a signature as the source has it, where types have their short names."""
    function = obj.__init__ if inspect.isclass(obj) else obj
    if dataclasses.is_dataclass(obj) or not inspect.isroutine(function):
        return None
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError):
        return None  # of C, or inherited from it
    arguments = node.args
    if what in ("class", "method", "exception") and arguments.args[:1]:
        del arguments.args[0]  # self
    returns = "" if inspect.isclass(obj) or node.returns is None else ast.unparse(node.returns)
    found, returns = (
        TYPES.sub(r"normwise.typing.\1", text) for text in (ast.unparse(arguments), returns)
    )
    return f"({found})", returns or None


def docstring(app, what, name, obj, options, lines):
    """Turn one docstring into reStructuredText, in place."""
    if name.startswith("normwise.ops."):
        lines[:] = [MODULE.sub(r"\1 :doc:`/api/ops`", line) for line in lines]
    lines[:] = list(_rewritten(_joined(lines)))


def skip(app, what, name, obj, skipped, options):
    """Leave out what only Keras calls."""
    return True if name in CALLED_BY_KERAS or name.startswith("on_") else None


def trim(app, page, source):
    """Take away the empty line that ends an example, which doctest needs and readers do not."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def _rewritten(lines):
    shown, in_example = False, False
    before = ""
    for number, line in enumerate(lines):
        indented = line.startswith("    ")
        opens = indented and not lines[number - 1].strip() and not before.startswith(" ")
        if opens and not in_example and not shown:
            shown = True
            yield from (".. code-block:: text", "")
        elif line and not indented:
            shown = False
        if line.startswith(">>>"):
            in_example = True
        elif in_example and not line.strip():
            in_example = False
        if line.strip() == "Example:":
            yield from (".. rubric:: Example", "")
        elif shown or in_example:
            yield line
        else:
            line = HEADED.sub(lambda found: f"**{found[0].rstrip()}** ", _escaped(line))
            yield FILE.sub(r":doc:`/\1`", line)
        before = line if line.strip() else before


def _escaped(line):
    """A line whose bars and lone asterisks are nothing but that, outside of code."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"\|", r"\\|", part) for part in parts[::2]]
    return "`".join(parts)


def _joined(lines):
    """The lines, with a list of arguments that goes over several lines on one."""
    joined = []
    for line in lines:
        if joined and re.fullmatch(r"    [\w, ]+,", joined[-1]):
            joined[-1] = f"{joined[-1]} {line.strip()}"
        else:
            joined.append(line)
    return joined
