"""Which kernel runs, what is said about it, and that every kernel gives the same numbers."""

import functools
import gc
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types
import weakref

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    assert_within,
    compiled,
    float64_enabled,
    gradients,
    second_gradients,
    to_numpy,
)
from norms import NORMS, every_norm, randomize, samples
from typer.testing import CliRunner

import normwise
from normwise import activations, cli, dispatch, doctor, geometry, layers, ops
from normwise.dispatch import Choice
from normwise.kernels import environment, gpu, library
from normwise.norm import Norm, Operands

built = pytest.mark.skipif(library.path() is None, reason="the native library was not built")

PLAN = geometry.group((2, 5, 6), -1, 3)
NO_COMPILER = "the native library was not built, for want of a C++ compiler"


def choose(plan=PLAN, dtype="float32", epsilon=1e-3, masked=False, x=None):
    operands = Operands(mask=masked or None)
    return dispatch.choose(Norm(plan, dtype, dtype, epsilon, operands=operands), x)


@pytest.fixture(autouse=True)
def _automatic():
    """Whatever mode the suite runs in; these tests say theirs themselves."""
    with normwise.use_kernels("auto"):
        yield


@pytest.fixture
def without_library(monkeypatch):
    """A machine on which the package was installed without a C++ compiler."""
    monkeypatch.setattr(library, "path", lambda: None)


@built
def test_native_is_chosen_wherever_it_can_run():
    x = keras.ops.convert_to_tensor(samples())
    for mode in ("auto", "native"):
        with normwise.use_kernels(mode):
            assert choose() == choose(x=x) == Choice("native", "the native kernels can take it")


@built
def test_composite_is_chosen_when_it_is_asked_for():
    middle = geometry.layer((2, 4, 5, 6), 1)
    with normwise.use_kernels("composite"):
        assert choose(middle) == Choice("composite", "use_kernels('composite') is in force")


@built
def test_composite_means_what_runs_without_the_library():
    with normwise.use_kernels("composite"):
        choice = choose()
    assert choice.kernel == ("torch" if BACKEND == "torch" else "composite")
    assert "use_kernels('composite') is in force" in choice.reason


AGAINST = {
    "mask": ({"masked": True}, "the native kernels take no mask"),
    "axes apart": (
        {"plan": geometry.layer((2, 4, 5, 6), (1, 3))},
        "the sets are not neighbouring axes",
    ),
    "dtype": ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn has no native kernel"),
}


def check_reason(options, reason):
    """The reason is given with the choice, and with the error where native was asked for."""
    choice = choose(**options)
    assert choice.kernel in ("composite", "torch")
    assert reason in choice.reason
    message = f"use_kernels('native') is in force, but {reason}"
    with (
        normwise.use_kernels("native"),
        pytest.raises(RuntimeError, match=re.escape(message)) as raised,
    ):
        choose(**options)
    assert str(raised.value).endswith("; use_kernels('auto') takes the next best kernel here")


@built
@pytest.mark.parametrize(("options", "reason"), AGAINST.values(), ids=AGAINST.keys())
def test_what_native_cannot_take_is_refused_with_the_reason(options, reason):
    check_reason(options, reason)


@pytest.mark.usefixtures("without_library")
def test_a_machine_without_the_library_says_so():
    check_reason({}, NO_COMPILER)
    x = keras.ops.convert_to_tensor(samples())
    assert_within(to_numpy(ops.layer_norm(x, epsilon=0.0)).mean(), 0.0, 1e-6)
    with normwise.use_kernels("native"), pytest.raises(RuntimeError, match=re.escape(NO_COMPILER)):
        ops.layer_norm(x)


@built
def test_layers_and_ops_refuse_by_themselves():
    x = keras.ops.convert_to_tensor(samples((2, 4, 5, 6)))
    with normwise.use_kernels("native"):
        assert ops.group_norm(x, groups=3).shape == x.shape
        with pytest.raises(RuntimeError, match="take no mask"):
            ops.group_norm(x, groups=3, mask=np.ones((2, 4), bool))
        with pytest.raises(RuntimeError, match="not neighbouring axes"):
            layers.LayerNormalization(axis=[1, 3])(x)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own norms")
@pytest.mark.parametrize(
    ("plan", "epsilon", "masked", "kernel"),
    [
        (PLAN, 1e-3, False, "torch"),
        (geometry.layer((2, 4, 5, 6), (2, 3)), 1e-3, False, "torch"),
        (geometry.layer((2, 4, 5, 6), 1), 1e-3, False, "composite"),
        (geometry.group((0, 5, 6), -1, 3), 1e-3, False, "composite"),
        (PLAN, 0.0, False, "composite"),
        (PLAN, 1e-3, True, "composite"),
    ],
)
@pytest.mark.usefixtures("without_library")
def test_torch_takes_over_where_its_own_norms_are_right(plan, epsilon, masked, kernel):
    choice = choose(plan, epsilon=epsilon, masked=masked)
    assert choice.kernel == kernel
    assert choice.reason.startswith("torch's own fused norm, since") == (kernel == "torch")


@pytest.mark.parametrize("mode", ["fast", "", None, "Native"])
def test_an_unknown_mode_is_an_error_and_changes_nothing(mode):
    message = f"mode={mode!r} names no kernels; use 'auto', 'native' or 'composite'"
    with pytest.raises(ValueError, match=re.escape(message)):
        normwise.use_kernels(mode)
    assert dispatch.mode() == "auto"


def raise_within(mode):
    with normwise.use_kernels(mode):
        assert dispatch.mode() == mode
        raise KeyError(mode)


def test_a_with_statement_gives_the_mode_back():
    with normwise.use_kernels("composite"):
        with normwise.use_kernels("native"):
            assert dispatch.mode() == "native"
            with pytest.raises(KeyError):
                raise_within("auto")
            assert dispatch.mode() == "native"
        assert dispatch.mode() == "composite"
    assert dispatch.mode() == "auto"


def test_a_call_sets_the_mode_for_good():
    normwise.use_kernels("composite")
    normwise.use_kernels("native")
    assert dispatch.mode() == "native"


ENVIRONMENT = """
import importlib, os
from normwise import dispatch

print(dispatch.mode())
os.environ["NORMWISE_KERNELS"] = "fastest"
importlib.reload(dispatch)
"""


def test_the_environment_sets_the_mode():
    process = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT],
        env={**os.environ, "NORMWISE_KERNELS": "composite"},
        capture_output=True,
        text=True,
    )
    assert process.stdout.split() == ["composite"]
    assert process.returncode
    message = "NORMWISE_KERNELS='fastest' names no kernels; use 'auto', 'native' or 'composite'"
    assert f"ValueError: {message}" in process.stderr


@built
@every_norm
def test_explain_says_the_same_of_a_layer_and_of_its_op(norm):
    native = Choice("native", "the native kernels can take it")
    for shape in ((2, 5, 6), (None, None, 6)):
        assert normwise.explain(norm.make(), shape) == native
        assert normwise.explain(norm.op, shape, **norm.options) == native
    half = norm.make(dtype="mixed_bfloat16")
    for dtype in ("bfloat16", "float64", "int32", None):
        assert normwise.explain(half, (2, 5, 6), dtype) == native


@built
def test_explain_gives_the_reason():
    apart = normwise.explain(layers.LayerNormalization(axis=[1, 3]), (2, 4, 5, 6))
    assert apart == Choice("composite", "the sets are not neighbouring axes")
    assert normwise.explain(ops.rms_norm, (2, 4, 5, 6), axis=(1, 3)) == apart
    # The dtype of the input alone: an op's result has it too.
    odd = normwise.explain(ops.layer_norm, (2, 6), "float8_e4m3fn")
    assert "float8_e4m3fn has no native kernel" in odd.reason
    # A layer casts it to its own.
    assert normwise.explain(layers.LayerNormalization(), (2, 6), "float8_e4m3fn").kernel == "native"
    with normwise.use_kernels("native"), pytest.raises(RuntimeError, match="neighbouring"):
        normwise.explain(ops.layer_norm, (2, 4, 5, 6), axis=(1, 3))


@pytest.mark.parametrize(
    ("what", "shape", "options", "error", "message"),
    [
        (ops.group_norm, (2, 5, 6), {}, ValueError, "groups=32 is more than the 6 channels"),
        (ops.group_norm, (2, 5, 6), {"groups": 4}, ValueError, "groups=4 does not divide the 6"),
        (ops.instance_norm, (2, 5, None), {}, ValueError, "is unknown; give that axis a fixed"),
        (ops.layer_norm, (2, 5, 6), {"axis": 3}, ValueError, "axis=3 is out of range"),
        (layers.GroupNormalization(4), (2, 5, 6), {}, ValueError, "groups=4 does not divide"),
        (len, (2, 5, 6), {}, TypeError, "<built-in function len> is no norm; pass a function"),
        (keras.layers.Dense(2), (2, 6), {}, TypeError, "is no norm; pass a function of normwise"),
    ],
)
def test_explain_raises_what_the_norm_would(what, shape, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        normwise.explain(what, shape, **options)


def doctors_words():
    result = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.output)


@built
def test_the_doctor_names_versions_backend_and_instructions():
    words = doctors_words()
    assert f"keras {keras.__version__}" in words
    assert f"numpy {np.__version__}" in words
    assert f"Keras backend {BACKEND}" in words
    assert "kernels in force auto" in words
    assert library.instructions() in ("avx512", "avx2", "baseline")
    assert f"{library.instructions()} instructions, up to {library.threads()} threads" in words
    assert f"GPU {BACKEND} has none" in words
    assert ("GPU kernels Triton is installed" in words) == (gpu.missing() is None)
    assert "the Triton kernels run on a GPU" in words or BACKEND == "tensorflow"
    assert doctor.report()["python"].startswith(".".join(map(str, sys.version_info[:3])))


@pytest.mark.usefixtures("without_library")
def test_the_doctor_says_what_is_missing():
    words = doctors_words()
    assert NO_COMPILER in words
    assert "install one (g++, clang++) and then normwise again" in words


def test_the_doctor_prints_the_extra_that_a_remedy_names(monkeypatch):
    monkeypatch.setattr(gpu, "missing", lambda: "run pip install 'normwise[gpu]'")
    assert "GPU kernels run pip install 'normwise[gpu]'" in doctors_words()


# The input's dtype, the layer's, and the precision of the result.
DTYPES = {
    "float32": ("float32", "float32", 2.0**-23),
    "float64": ("float64", "float64", 2.0**-52),
    "mixed_bfloat16": ("bfloat16", "mixed_bfloat16", 2.0**-7),
    "float32 into bfloat16": ("float32", "mixed_bfloat16", 2.0**-7),
    "float64 into float32": ("float64", "float32", 2.0**-23),
    "int32": ("int32", "float32", 2.0**-23),
}


def both_kernels(work):
    """What `work` gives with the native kernels, and with the composite."""
    for mode in ("native", "composite"):
        with normwise.use_kernels(mode):
            yield work()


@built
@every_norm
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("activation", ["gelu", "softplus"])
@pytest.mark.parametrize(("given", "dtype", "eps"), DTYPES.values(), ids=DTYPES.keys())
def test_native_and_composite_agree(norm, axis, activation, given, dtype, eps):
    """As layers: with every cast before and after, and an activation that is fused or is not."""
    if BACKEND == "tensorflow" and activation == "gelu":
        # TensorFlow 2.21 rounds the root of 2 in it to float32, whatever z is.
        eps = max(eps, 2.0**-23)
    with float64_enabled():
        x = keras.ops.cast(samples((2, 6, 6)) * 10, given)
        layer = norm.make(axis=axis, activation=activation, dtype=dtype)
        layer.build(x.shape)
        randomize(layer)
        native, readable = both_kernels(lambda: compiled(lambda x: layer(x))(x))
        assert native.dtype == readable.dtype
        assert keras.backend.standardize_dtype(native.dtype) == layer.compute_dtype
        readable = to_numpy(readable)
        assert_within(to_numpy(native), readable, 32 * eps * (1 + np.abs(readable)))


@built
@pytest.mark.parametrize("norm", [NORMS["group"], NORMS["layer"]], ids=["group", "layer"])
def test_their_gradients_agree(norm):
    """The first and the second, by x, gamma and beta, of an op with an activation."""
    x = samples()
    parameters = np.random.default_rng(1).uniform(0.5, 1.5, (2, 6)).astype("float32")

    def function(*arrays):
        return norm.op(*arrays, activation="tanh", **norm.options)

    for work in (
        lambda: gradients(function, [x, *parameters], np.cos(x))[1],
        lambda: second_gradients(function, [x, *parameters], np.cos(x), np.sin(x)),
    ):
        for native, readable in zip(*both_kernels(work), strict=True):
            assert_within(native, readable, 1e-4 * (1 + np.abs(readable).max()))


@built
def test_a_model_trains_alike_on_both():
    x = samples((16, 5, 6))

    def trained():
        keras.utils.set_random_seed(0)
        norms = [NORMS[name].make(activation="relu") for name in ("group", "layer")]
        model = keras.Sequential([keras.Input((5, 6)), *norms, keras.layers.Dense(2)])
        model.compile("sgd", "mse", jit_compile=False)
        before = model.get_weights()
        losses = [model.train_on_batch(x, x[..., :2]) for _ in range(3)]
        return before, losses, model.get_weights()

    (_, losses, weights), (before, want_losses, want) = both_kernels(trained)
    assert_within(losses, np.asarray(want_losses), 1e-4)
    for found, expected, start in zip(weights, want, before, strict=True):
        assert np.abs(expected - start).max() > 1e-3
        assert_within(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NORMWISE_NUM_THREADS", "0", "NORMWISE_NUM_THREADS='0' is no number of threads; use a"),
        ("NORMWISE_NUM_THREADS", "two", "NORMWISE_NUM_THREADS='two' is no number of threads"),
        ("NORMWISE_NUM_THREADS", "٣", "NORMWISE_NUM_THREADS='٣' is no number of threads"),
        ("NORMWISE_INSTRUCTIONS", "sse", "NORMWISE_INSTRUCTIONS='sse' names no instruction set"),
    ],
)
def test_the_environment_is_checked(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        environment.check()


def test_a_good_environment_is_accepted(monkeypatch):
    monkeypatch.setenv("NORMWISE_NUM_THREADS", "3")
    monkeypatch.setenv("NORMWISE_INSTRUCTIONS", "avx2")
    environment.check()


def test_activations_have_the_numbers_of_the_library():
    header = pathlib.Path(__file__).parents[1] / "csrc" / "normwise.h"
    if not header.exists():
        pytest.skip("the sources are not here")
    numbers = re.findall(r"NORMWISE_(\w+) = (\d+)", header.read_text().partition("Activation {")[2])
    known = [(name.upper(), str(code)) for code, name in enumerate(activations.NAMES)]
    assert numbers[: len(known)] == known
    assert activations.Activation("gelu").code == 5


def test_a_fused_activation_is_that_of_keras():
    z = np.linspace(-3, 3, 13).astype("float32")
    for function in (
        None,
        keras.activations.relu,
        keras.activations.leaky_relu,
        functools.partial(keras.activations.leaky_relu, negative_slope=0.3),
        functools.partial(keras.activations.leaky_relu, negative_slope=0.0),
        keras.activations.sigmoid,
        keras.activations.tanh,
        keras.activations.silu,
        keras.activations.gelu,
        functools.partial(keras.activations.gelu, approximate=True),
    ):
        found = activations.find(function)(keras.ops.convert_to_tensor(z))
        want = z if function is None else to_numpy(function(keras.ops.convert_to_tensor(z)))
        assert_within(to_numpy(found), want, 1e-6)
    for unknown in (
        keras.activations.softplus,
        lambda z: z,
        functools.partial(keras.activations.relu, max_value=6),
        functools.partial(keras.activations.gelu, True),
    ):
        assert activations.find(unknown) is None


class Unhashable:
    """An activation of the user's that cannot be looked up."""

    __hash__ = None

    def __call__(self, z):
        return 2 * z


def test_an_activation_is_neither_looked_up_nor_kept():
    x = samples()
    twice = to_numpy(ops.layer_norm(x, activation=Unhashable()))
    assert_within(twice, 2 * to_numpy(ops.layer_norm(x)), 1e-6)

    held = Unhashable()
    gone = weakref.ref(held)
    ops.layer_norm(x, activation=lambda z, held=held: z)
    del held
    gc.collect()
    assert gone() is None


@built
@pytest.mark.parametrize("axis", [-1, 1])
def test_batch_norm_is_what_its_geometry_says(axis):
    """Its layout in memory is not instance norm's: a set is a channel of the whole batch."""
    x = samples((3, 4, 5, 4))
    norm = Norm(geometry.batch(x.shape, axis), "float32", "float32", 1e-3)
    found = compiled(lambda x: choose_and_run(norm, x))(keras.ops.convert_to_tensor(x))
    others = tuple(a for a in range(4) if a != axis % 4)
    want = (x - x.mean(others, keepdims=True)) / np.sqrt(x.var(others, keepdims=True) + 1e-3)
    assert_within(to_numpy(found), want, 1e-5)
    if BACKEND == "torch":
        import torch

        apart = torch.tensor(x).to(memory_format=torch.channels_last)
        assert_within(to_numpy(choose_and_run(norm, apart)), want, 1e-5)


def choose_and_run(norm, x):
    choice = dispatch.choose(norm, x)
    assert choice.kernel == "native"
    return choice.run(norm, x, Operands())


def test_equal_elements_give_beta_at_an_epsilon_that_float32_has_not():
    for mode in ("auto", "composite"):
        with normwise.use_kernels(mode):
            y = ops.layer_norm(np.full((2, 6), 3.0, "float32"), epsilon=1e-50)
            assert_within(to_numpy(y), np.zeros((2, 6)), 0)


def test_explain_asks_for_the_device(monkeypatch):
    """Not for one of the CPU on a machine where tensors lie elsewhere."""
    if BACKEND == "jax":
        import jax

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elif BACKEND == "tensorflow":
        from normwise.kernels import tensorflow

        monkeypatch.setattr(tensorflow, "_has_accelerator", lambda: True)
    else:
        elsewhere = types.SimpleNamespace(is_cpu=False, is_meta=False, is_cuda=False)
        monkeypatch.setattr(keras.ops, "zeros", lambda *args: elsewhere)
    choice = normwise.explain(ops.layer_norm, (2, 6))
    assert choice.kernel in ("composite", "torch")
    assert "the native kernels run on the CPU, and" in str(choice) or not library.path()


@built
def test_explain_asks_as_the_call_itself_does():
    """Of integers, of what a layer makes of its options, and of what the function refuses."""
    integers = normwise.explain(ops.layer_norm, (2, 6), dtype="int32")
    assert integers.kernel == "native"
    with pytest.warns(UserWarning, match="rms_scaling"):
        layer = layers.LayerNormalization(rms_scaling=True)
    assert "take no mask" in normwise.explain(layer, (2, 6)).reason
    assert "take no mask" in normwise.explain(ops.layer_norm, (2, 6), mask=True).reason
    assert normwise.explain(ops.layer_norm, (2, 6), activation="relu").kernel == "native"
    with pytest.raises(TypeError, match="complex64, and no norm is defined on complex numbers"):
        normwise.explain(ops.layer_norm, (2, 6), dtype="complex64")
    with pytest.raises(TypeError, match="a layer has its options itself; leave out groups"):
        normwise.explain(layers.LayerNormalization(), (2, 6), groups=3)


def test_a_norm_that_is_read_in_another_process_is_found():
    """Strings, which a norm has, have another hash there."""
    norm = Norm(geometry.group((2, 5, 6), groups=3), "float32", "float32", 1e-3)
    assert hash(norm)
    code = (
        "import pickle, sys; from normwise import geometry; from normwise.norm import Norm\n"
        "norm = Norm(geometry.group((2, 5, 6), groups=3), 'float32', 'float32', 1e-3)\n"
        "found = pickle.load(sys.stdin.buffer); assert found in {norm}, (hash(found), hash(norm))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    given = pickle.dumps(norm)
    subprocess.run([sys.executable, "-c", code], input=given, env=environment, check=True)
