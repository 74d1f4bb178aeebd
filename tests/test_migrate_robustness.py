"""Files that are damaged or hostile: loaded or refused in words, at little cost, without a trace.

`make fuzz` tries 2,000 mutations; every run of the tests tries the first of them.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import keras
import old_models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import GREEDY, configs, greedy_cases, greedy_hdf5, greedy_models, hostile, mutate
from mutations.hostile import CONFIG, WEIGHTS

from normwise.text import one_line

if sys.platform != "linux":
    pytest.skip("the limits of a process are Linux's", allow_module_level=True)

from sandbox import Sandbox

FIXTURES = Path(__file__).parents[2] / "shared" / "tfa_models"
BY_BACKEND = {"jax": (500, 120), "tensorflow": (150, 40), "torch": (150, 40)}
COUNT, GREEDY_COUNT = (
    int(os.environ.get("NORMWISE_MUTATIONS") or count)
    for count in BY_BACKEND[keras.config.backend()]
)
LONGEST_ERROR = 25_000
PROCESSOR_LIMIT_S = 5.0
MEMORY_LIMIT_MIB = 1024


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as sandbox:
        yield sandbox


@pytest.fixture
def folder(sandbox):
    """A folder for one file, deep in one that is watched."""
    made = sandbox.folder / "deep" / "input"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files with nothing wrong, each with the model that its weights are for, if it is no model."""
    made = tmp_path_factory.mktemp("whole")
    files = {
        old_models.write_h5(made / "small.h5", CONFIG, WEIGHTS): None,
        old_models.write_keras(made / "small.keras", CONFIG, WEIGHTS): None,
    }
    for path in sorted(FIXTURES.glob("*.*")):
        if path.name.endswith(".weights.h5"):
            files[path] = path.with_name(path.name.replace(".weights", ""))
        elif path.suffix in (".h5", ".keras", ".savedmodel"):
            files[path] = None
    return files


def fault(outcome, path):
    """What is wrong with how a load ended, or None."""
    if outcome.died:
        return f"the process ended: {outcome.died}"
    if outcome.written:
        return f"files changed: {outcome.written}"
    if outcome.error not in ("", "ValueError", "OSError"):
        return f"raised {outcome.error}: {outcome.text}\n{outcome.traceback}"
    if outcome.error and one_line(path.name) not in outcome.text:
        return f"does not name the file: {outcome.text}\n{outcome.traceback}"
    if not outcome.text.isprintable():
        return f"is no line, or has what a terminal obeys: {outcome.text!r}"
    if len(outcome.text) > LONGEST_ERROR:
        return f"has {len(outcome.text)} characters: {outcome.text:.200}"
    if outcome.processor_s > PROCESSOR_LIMIT_S:
        return f"took {outcome.processor_s:.1f} s"
    if outcome.memory_mib > MEMORY_LIMIT_MIB:
        return f"took {outcome.memory_mib:.0f} MiB"
    return None


def test_whole_files_load(sandbox, whole, folder):
    for path, model in whole.items():
        outcome = sandbox.load(path, model)
        assert not outcome.error, (path, outcome.text)
        assert fault(outcome, path) is None


def test_mutated_files_are_loaded_or_refused(sandbox, whole, folder):
    faults, loaded = [], 0
    for index in range(COUNT):
        rng = random.Random(f"mutation {index}")
        path = rng.choice(list(whole))
        shutil.rmtree(folder)
        folder.mkdir()
        mutated, kind = mutate(path, folder, rng)
        outcome = sandbox.load(mutated, whole[path])
        loaded += not outcome.error and not outcome.died
        if found := fault(outcome, mutated):
            faults.append(f"{index}, {path.name}, {kind}: {found}")
    assert not faults, f"{len(faults)} of {COUNT}:\n" + "\n".join(faults)
    # Mutations that never load, or never fail, try nothing.
    assert 0.05 * COUNT < loaded < 0.8 * COUNT


def test_greedy_files_are_loaded_or_refused(sandbox, folder, tmp_path_factory):
    model = old_models.write_h5(
        tmp_path_factory.mktemp("model") / "model.h5", greedy_hdf5.CONFIG, greedy_models.WEIGHTS
    )
    faults = []
    for index in range(GREEDY_COUNT):
        rng = random.Random(f"greedy {index}")
        shutil.rmtree(folder)
        folder.mkdir()
        path, kind, action = GREEDY[index % len(GREEDY)](folder, rng)
        if action == "convert":
            outcome = sandbox.convert(path)
        else:
            outcome = sandbox.load(path, model if action == "weights" else None)
        if found := fault(outcome, path):
            faults.append(f"{index}, {action}, {kind}: {found}")
    assert not faults, f"{len(faults)} of {GREEDY_COUNT}:\n" + "\n".join(faults)


HOSTILE = {**hostile.HOSTILE, **greedy_cases.HOSTILE}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(sandbox, folder, name):
    make, texts = HOSTILE[name]
    path = make(folder)
    outcome = sandbox.load(path)
    assert fault(outcome, path) is None
    assert outcome.error
    assert all(text in outcome.text for text in texts), outcome.text


@pytest.mark.parametrize("name", greedy_cases.GREEDY_INPUTS)
def test_input_that_costs_too_much_is_not_drawn(sandbox, folder, name):
    make, text = greedy_cases.GREEDY_INPUTS[name]
    path = make(folder)
    assert not sandbox.load(path).error
    outcome = sandbox.convert(path)
    assert fault(outcome, path) is None
    assert f"{text}, which is the most for a file of" in outcome.text
    assert "use load_model" in outcome.text


@pytest.mark.parametrize("name", greedy_cases.HARMLESS)
def test_odd_files_are_converted(sandbox, folder, name):
    path = greedy_cases.HARMLESS[name](folder)
    outcome = sandbox.convert(path)
    assert fault(outcome, path) is None
    assert not outcome.error, outcome.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=5,
)


@settings(max_examples=30 if COUNT < 2000 else 500)
@given(place=st.integers(0, 1000), value=json_values)
def test_a_config_may_say_anything_anywhere(sandbox, tmp_path_factory, place, value):
    config = json.loads(json.dumps(CONFIG))
    places = list(configs.places(config))
    holder, key, _ = places[place % len(places)]
    holder[key] = value
    path = sandbox.folder / "deep" / "config.h5"
    old_models.write_h5(path, config, WEIGHTS, layers=list(WEIGHTS))
    assert fault(sandbox.load(path), path) is None
