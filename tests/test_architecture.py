"""The floors of the house: imports point down only, and only the kernels may name a framework."""

import ast
import pathlib
import re
import subprocess
import sys

import keras
import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "src" / "normwise"
MODULES = sorted(PACKAGE.rglob("*.py"))
KEPT_BY_KERAS = re.compile(r"keras\.src|\._(flatten_layers|(non_)?trainable_variables|keras_)")
FRAMEWORKS = {"jax", "jaxlib", "tensorflow", "torch", "tensorflow_addons"}

# From the ground up; a floor may use those before it. The package itself only puts doors on them.
FLOORS = [
    "geometry",
    "typing",
    "text",
    "keras_private",
    "activations",
    "norm",
    "kernels",
    "dispatch",
    "ops",
    "layers",
    "rnn",
    "doctor",
    "models",
    "migrate",
    "tutorial",
    "terminal",
    "model_commands",
    "cli",
]


def imports(path):
    """Every module that a file imports, anywhere in it, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_down(path):
    floor = floor_of(path)
    if floor == "__init__":
        return
    below = set(FLOORS[: FLOORS.index(floor) + 1])
    if floor == "geometry":
        below = set()
    for imported in imports(path):
        package, _, rest = imported.partition(".")
        # `from normwise import x` is listed as normwise and as normwise.x; the latter decides.
        if package == "normwise" and rest and rest.partition(".")[0] in FLOORS:
            assert rest.partition(".")[0] in below, f"{name(path)} may not import {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_kernels_name_a_framework(path):
    if floor_of(path) != "kernels":
        named = {imported.partition(".")[0] for imported in imports(path)}
        assert not named & FRAMEWORKS


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_printing_is_the_command_lines(path):
    # A report is printed by whoever asked for it, as the table that it knows how to be.
    if floor_of(path) in ("migrate", "models") and name(path) != "models/report.py":
        assert not {each.partition(".")[0] for each in imports(path)} & {"typer", "rich"}


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("migrate/models", {"source"}),
        ("migrate/source", {"models"}),
    ],
)
def test_models_and_source_are_two_programs(folder, others):
    for path in (PACKAGE / folder).rglob("*.py"):
        for imported in imports(path):
            if imported.startswith("normwise.migrate."):
                assert imported.split(".")[2] not in others, f"{name(path)} imports {imported}"


def test_what_reads_files_needs_no_keras():
    """The process that runs it imports neither Keras nor the package."""
    for path in (PACKAGE / "migrate/models/reading").glob("*.py"):
        for imported in imports(path):
            package = imported.partition(".")[0]
            is_here = imported.startswith("normwise.migrate.models.reading")
            assert is_here or package in {*sys.stdlib_module_names, "h5py", "numpy"}


def test_every_module_has_a_floor():
    assert {floor_of(path) for path in MODULES} == {*FLOORS, "__init__"}


def test_geometry_stands_alone():
    named = {imported.partition(".")[0] for imported in imports(PACKAGE / "geometry.py")}
    assert named <= set(sys.stdlib_module_names)


def test_import_brings_no_other_framework_and_no_figures():
    backend = keras.backend.backend()
    # Keras's own import is the measure: what it brings with it is not for normwise to answer for.
    program = (
        "import sys, keras; before = set(sys.modules); import normwise;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    run = [sys.executable, "-c", program]
    brought = set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    others = {"matplotlib", "sklearn", "typer", "rich", "libcst", "triton"}
    forbidden = FRAMEWORKS - {backend} | others
    assert "normwise" in brought
    assert not brought & forbidden


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_one_module_names_what_keras_keeps_to_itself(path):
    if floor_of(path) not in ("kernels", "keras_private"):
        assert not KEPT_BY_KERAS.findall(path.read_text())
