"""The Triton kernels on JAX as a machine without a GPU can test them.

Programs for GPUs are lowered, not run: their custom calls are looked at, and what jaxlib is told by
them. It takes JAX's plugin for GPUs, which beside a jaxlib of the CPU lies in a folder of its own,
since it writes to stderr wherever JAX finds it:

    pip install --no-deps --target .venv/jax-gpu jax-cuda12-plugin==(jaxlib's version)
"""

import functools
import importlib
import pathlib
import re
import struct
import subprocess
import sys
import types
import zlib

import keras
import numpy as np
import pytest
from frameworks import assert_within, to_numpy
from norms import samples
from plans import EPSILON

import normwise
from normwise import geometry, ops
from normwise.kernels import gpu, library, private

if keras.backend.backend() != "jax":
    pytest.skip("the kernels of another backend", allow_module_level=True)
if gpu.missing() or gpu.interpreted():
    pytest.skip(gpu.missing() or "compiled kernels", allow_module_level=True)

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir

from normwise.kernels import jax as kernel
from normwise.kernels import jax_gpu
from normwise.kernels.gpu import plan
from normwise.kernels.gpu.launch import Device
from normwise.norm import PER_SAMPLE, SHARED, Norm, Operands

DEVICES = {
    "cuda": Device("cuda", 90, 32, multiprocessors=132),
    "rocm": Device("hip", "gfx942", 64, multiprocessors=304),
}
PLUGIN = pathlib.Path(sys.prefix, "jax-gpu")

# The norm, its options, the shape of x, and how many launches each pass takes.
CASES = {
    "layer": (ops.layer_norm, {}, (64, 33, 768), (1, 2)),
    "two axes": (ops.layer_norm, {"axis": (-2, -1)}, (8, 6, 16), (1, 2)),
    "rms": (ops.rms_norm, {}, (16, 1024), (1, 2)),
    "kept": (ops.layer_norm, {"axis": 1}, (4, 96, 7, 7), (1, 2)),
    "group": (ops.group_norm, {"groups": 8}, (8, 7, 7, 64), (1, 2)),
    "channels first": (ops.group_norm, {"groups": 8, "axis": 1}, (8, 64, 7, 7), (1, 2)),
    "batch of one": (ops.group_norm, {"groups": 8}, (1, 128, 128, 64), (3, 4)),
    "long rows": (ops.layer_norm, {}, (4, 100_000), (3, 4)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
STABLEHLO = {"float32": "f32", "bfloat16": "bf16"}


@pytest.fixture(autouse=True)
def _automatic():
    with normwise.use_kernels("auto"):
        yield


@pytest.fixture
def gpus(monkeypatch):
    """JAX as it is where GPUs are, but for jaxlib's call of a kernel."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax_gpu, "device", lambda: DEVICES["cuda"])
    jax_gpu._why_not_here.cache_clear()
    yield
    jax_gpu._why_not_here.cache_clear()


@pytest.fixture
def plugin(gpus, monkeypatch):
    """The same with that."""
    if private.missing(private.JAX_GPU) is None:
        return
    monkeypatch.setattr(sys, "path", [str(PLUGIN), *sys.path])
    try:
        call = importlib.import_module("jax_cuda12_plugin._triton")
    except ImportError:
        pytest.skip(f"there is no jax-cuda12-plugin in {PLUGIN}")
    import jaxlib.gpu_triton

    monkeypatch.setattr(jaxlib.gpu_triton, "_cuda_triton", call)
    for each in private.JAX_GPU.values():
        name = each.path.rpartition(".")[-1]
        monkeypatch.setattr(jaxlib.gpu_triton, name, getattr(call, name), raising=False)


def arrays(case, dtype="float32", gamma=True, beta=True):
    """The operands of a case, without their values."""
    _, options, shape, _ = case
    axes = np.atleast_1d(options.get("axis", -1))
    of_channels = jax.ShapeDtypeStruct([shape[axis] for axis in axes], "float32")
    x = jax.ShapeDtypeStruct(shape, dtype)
    return (x, of_channels if gamma else None, of_channels if beta else None)


def function(case):
    norm, options, _, _ = case
    return lambda x, gamma, beta: norm(x, gamma, beta, epsilon=EPSILON, **options)


def lowered(function, *arrays, platform="cuda"):
    # Of a new function: JAX keeps traces, and with them the kernels that were chosen.
    traced = jax.jit(lambda *arrays: function(*arrays)).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,))


def calls(function, *arrays, platform="cuda"):
    """The custom calls of a program: what is called with which types, and the message."""
    found = []

    def look(operation):
        if operation.name == "stablehlo.custom_call":
            attributes = operation.attributes
            assert attributes["call_target_name"].value == "triton_kernel_call_ffi"
            kinds = (
                [str(value.type).removeprefix("tensor") for value in values]
                for values in (operation.operands, operation.results)
            )
            found.append((*kinds, attributes["mhlo.backend_config"]["opaque"].value_bytes))
        return ir.WalkResult.ADVANCE

    lowered(function, *arrays, platform=platform).compiler_ir().operation.walk(look)
    return found


def planned(case, dtype, gamma=True, beta=True):
    """The same of a case, as it follows from the plans alone."""
    norm, options, shape, _ = case
    make = geometry.group if norm is ops.group_norm else geometry.layer
    operands = Operands(SHARED if gamma else None, SHARED if beta else None)
    known = Norm(
        make(shape, **options), dtype, dtype, EPSILON, norm is not ops.rms_norm, operands=operands
    )
    of = {"x": (shape, dtype), "gamma": (known.geometry.parameter_shape, "float32")}
    of["y"] = of["dy"] = of["dx"] = of["x"]
    of["beta"] = of["dgamma"] = of["dbeta"] = of["gamma"]
    of["statistics"] = (known.geometry.statistics_shape(shape), "float32")
    for one in (
        plan.forward(known, DEVICES["cuda"]),
        plan.backward(known, DEVICES["cuda"], gamma, beta),
    ):
        of |= {name: ((elements,), "float32") for name, elements in one.scratch.items()}
        yield [
            tuple(
                [f"<{'x'.join(map(str, of[n][0]))}x{STABLEHLO[of[n][1]]}>" for n in names if n]
                for names in (launch.reads, launch.writes)
            )
            for launch in one.launches
        ]


def without_message(found):
    return [call[:2] for call in found]


def gradient(function, wanted=(0, 1, 2)):
    """y and the gradients of something that depends on y."""

    def both(x, *parameters):
        y, pull = jax.vjp(function, x, *parameters)
        return y, pull(jnp.sin(y))

    return both


@every_case
@pytest.mark.parametrize("dtype", STABLEHLO)
@pytest.mark.usefixtures("plugin")
def test_a_program_has_a_call_for_each_launch(case, dtype):
    operands = arrays(case, dtype)
    found = calls(gradient(function(case)), *operands)
    forward, backward = planned(case, dtype)
    assert without_message(found) == forward + backward
    assert (len(forward), len(backward)) == case[-1]
    assert without_message(calls(function(case), *operands)) == forward


@pytest.mark.parametrize(("gamma", "beta"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["layer", "kept", "batch of one", "long rows"])
@pytest.mark.usefixtures("plugin")
def test_gamma_and_beta_may_be_absent(name, gamma, beta):
    operands = arrays(CASES[name], "float32", gamma, beta)
    forward, backward = planned(CASES[name], "float32", gamma, beta)
    found = calls(gradient(function(CASES[name])), *operands)
    assert without_message(found) == forward + backward


@pytest.mark.usefixtures("plugin")
def test_the_arrays_say_whether_there_is_gamma():
    x, gamma, _ = arrays(CASES["two axes"])
    absent = jax.ShapeDtypeStruct((0,), "float32")
    norm = Norm(geometry.layer(x.shape, (-2, -1)), "float32", "float32", EPSILON)
    bind = functools.partial(kernel._NATIVE.forward.bind, norm=norm)
    ((reads, _, _),) = calls(bind, x, gamma, absent, absent)
    assert reads == ["<8x6x16xf32>", "<6x16xf32>"]


@pytest.mark.parametrize("name", ["layer", "kept", "batch of one", "long rows"])
@pytest.mark.usefixtures("plugin")
def test_all_operands_are_those_of_the_plans(name):
    """Gamma and beta of each sample, a residual, and what comes to the sum by another way."""
    norm, options, shape, _ = CASES[name]
    make = geometry.group if norm is ops.group_norm else geometry.layer
    operands = Operands(PER_SAMPLE, PER_SAMPLE, residual=True)
    known = Norm(make(shape, **options), "bfloat16", "bfloat16", EPSILON, operands=operands)
    x = jax.ShapeDtypeStruct(shape, "bfloat16")
    own = jax.ShapeDtypeStruct((shape[0], *known.geometry.parameter_shape), "float32")
    statistics = jax.ShapeDtypeStruct(known.geometry.statistics_shape(shape), "float32")
    forward, backward = (
        functools.partial(each, norm=known) for each in (jax_gpu.forward, jax_gpu.backward)
    )
    for one, found, given in (
        (plan.forward(known, DEVICES["cuda"]), forward, (x, own, own, x)),
        (
            plan.backward(known, DEVICES["cuda"], True, True, dsum=True),
            backward,
            (x, own, own, statistics, x, x),
        ),
    ):
        programs = [(told(call[2])[1], len(call[0]), len(call[1])) for call in calls(found, *given)]
        assert programs == [
            (each.programs, sum(map(bool, each.reads)), sum(map(bool, each.writes)))
            for each in one.launches
        ]


@pytest.mark.usefixtures("plugin")
def test_transformations_lead_to_the_same_calls():
    case = (*CASES["group"][:2], (3, 8, 7, 7, 64), CASES["group"][3])
    x, gamma, beta = arrays(case)
    batched = jax.vmap(function(case), (0, None, None))
    (call,) = without_message(calls(batched, x, gamma, beta))
    assert call == (
        ["<3x8x7x7x64xf32>", "<64xf32>", "<64xf32>"],
        ["<3x8x7x7x64xf32>", "<3x8x2x8xf32>"],
    )

    x, gamma, beta = arrays(CASES["group"])
    both = calls(gradient(function(CASES["group"])), x, gamma, beta)
    remade = calls(gradient(jax.checkpoint(function(CASES["group"]))), x, gamma, beta)
    assert without_message(remade) == without_message([both[0], *both])

    def slope(x):
        return jax.grad(lambda x: jnp.sin(ops.layer_norm(x)).sum())(x)

    def curvature(x):
        return jax.grad(lambda x: jnp.sin(slope(x)).sum())(x)

    assert len(calls(slope, x)) == 2
    # The derivatives of the backward pass are the composite's.
    assert len(calls(curvature, x)) == 2
    assert calls(jax.hessian(slope), jax.ShapeDtypeStruct((2, 6), "float32"))


@pytest.mark.usefixtures("plugin")
def test_a_program_may_be_for_several_devices_and_give_its_input_away():
    x = jax.ShapeDtypeStruct((8, 6), "float32")
    donating = jax.jit(ops.layer_norm, donate_argnums=0).trace(x)
    text = donating.lower(lowering_platforms=("cuda",)).as_text()
    assert "tf.aliasing_output = 0" in text
    assert text.count("@triton_kernel_call_ffi") == 1


X = jax.ShapeDtypeStruct((2, 5, 6), "float32")


@pytest.mark.usefixtures("plugin")
class TestTheCompositeRuns:
    def test_for_a_mask(self):
        keep = np.ones((2, 5), bool)
        assert calls(lambda x: ops.layer_norm(x, mask=keep), X) == []

    def test_for_float64(self):
        with jax.enable_x64():
            x = jax.ShapeDtypeStruct((2, 5, 6), "float64")
            assert calls(ops.layer_norm, x) == []
            # Chosen on a CPU, whose native kernels know it.
            norm = Norm(geometry.layer(x.shape), "float64", "float64", EPSILON)
            absent = jax.ShapeDtypeStruct((0,), "float64")
            bind = functools.partial(kernel._NATIVE.forward.bind, norm=norm)
            assert calls(bind, x, absent, absent, absent) == []

    def test_for_an_empty_input(self):
        x = jax.ShapeDtypeStruct((0, 6), "float32")
        assert calls(gradient(ops.layer_norm), x) == []

    def test_where_it_is_asked_for(self):
        with normwise.use_kernels("composite"):
            assert calls(ops.layer_norm, X) == []

    def test_in_exported_programs(self):
        exported = jax.export.export(jax.jit(ops.layer_norm), platforms=("cuda", "cpu"))(X)
        assert "triton" not in exported.mlir_module()
        (n,) = jax.export.symbolic_shape("n")
        exported = jax.export.export(jax.jit(ops.layer_norm), platforms=("cuda",))(
            jax.ShapeDtypeStruct((n, 6), "float32")
        )
        assert "triton" not in exported.mlir_module()

    def test_on_other_platforms(self):
        assert calls(ops.layer_norm, X, platform="tpu") == []

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr(gpu, "missing", lambda: "Triton is gone")
        assert calls(ops.layer_norm, X) == []
        check_reason("Triton is gone")

    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(jax_gpu, "device", lambda: "JAX has no GPU here")
        assert calls(ops.layer_norm, X) == []
        check_reason("JAX has no GPU here")


def check_reason(reason):
    choice = normwise.explain(ops.layer_norm, (2, 5, 6))
    assert choice.kernel == "composite"
    assert f"triton: no, {reason}" in str(choice)


@pytest.mark.parametrize("name", private.JAX_GPU)
@pytest.mark.usefixtures("plugin")
def test_without_a_name_of_the_plugin_the_composite_runs(name, monkeypatch):
    path, find = private.JAX_GPU[name].path, private.find
    monkeypatch.setattr(private, "find", lambda wanted: None if wanted == path else find(wanted))
    assert calls(ops.layer_norm, X) == []
    check_reason(f"jaxlib {jax.lib.__version__} lacks {path}, by which normwise learns how to")


@pytest.mark.usefixtures("gpus")
def test_in_triton_s_interpreter_the_composite_runs(monkeypatch):
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    check_reason("TRITON_INTERPRET is set, and JAX calls compiled kernels only")


@pytest.mark.usefixtures("plugin")
def test_explain_says_what_runs_on_a_gpu():
    choice = normwise.explain(ops.layer_norm, (2, 5, 6))
    assert choice.kernel == "triton"
    if library.path() is not None:
        assert "native: no, the native kernels run on the CPU, and JAX runs on gpu" in str(choice)
    assert normwise.explain(ops.layer_norm, (None, 6)).kernel == "triton"


def test_explain_says_that_there_is_no_gpu():
    with normwise.use_kernels("auto"):
        choice = normwise.explain(ops.layer_norm, (2, 4, 5, 6), axis=(1, 3))
    assert "triton: no, the Triton kernels run on a GPU, and JAX runs on cpu" in str(choice)
    assert "no GPU" in jax_gpu.device()


@pytest.mark.usefixtures("plugin")
def test_a_program_chosen_for_a_gpu_runs_on_a_cpu(monkeypatch):
    x = samples((3, 7, 11))
    want = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    assert normwise.explain(ops.layer_norm, x.shape).kernel == "triton"
    assert_within(to_numpy(ops.layer_norm(x, epsilon=0.0)), want, 1e-5)
    monkeypatch.setattr(library, "path", lambda: None)
    x, want = x[:2], want[:2]
    assert_within(to_numpy(jax.jit(lambda x: ops.layer_norm(x, epsilon=0.0))(x)), want, 1e-5)


def a_gpu(capability="9.0", multiprocessors=132, kind="NVIDIA H100"):
    return types.SimpleNamespace(
        compute_capability=capability, core_count=multiprocessors, device_kind=kind
    )


@pytest.mark.parametrize(
    ("gpus", "found"),
    [
        ([a_gpu(), a_gpu()], DEVICES["cuda"]),
        ([a_gpu("12.0", 84)], Device("cuda", 120, 32, 84)),
        ([a_gpu("gfx942:sramecc+:xnack-", 304, "MI300X")], DEVICES["rocm"]),
        ([a_gpu("gfx1100", 48)], "in warps of 64 threads, and gfx1100 has 32"),
        ([a_gpu(), a_gpu("8.0", 108, "NVIDIA A100")], "there are NVIDIA A100, NVIDIA H100"),
    ],
)
def test_what_is_known_of_a_gpu(gpus, found, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend: gpus)
    device = jax_gpu.device.__wrapped__()
    assert device == found or (isinstance(found, str) and found in device)


# The messages


def varint(message):
    """A number in the format of Protocol Buffers, and what follows it."""
    number = shift = 0
    for place, byte in enumerate(message):
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, message[place + 1 :]
    raise ValueError("a number without an end")


def fields(message):
    """The fields of such a message: their numbers and values, in order."""
    while message:
        key, message = varint(message)
        if key & 7 == 0:
            value, message = varint(message)
        elif key & 7 == 2:
            length, message = varint(message)
            value, message = message[:length], message[length:]
        else:
            value, message = struct.unpack("<f", message[:4])[0], message[4:]
            assert key & 7 == 5
        yield key >> 3, value


def told(opaque):
    """What jaxlib is told: the kernel's fields, the number of programs, the parameters."""
    message = dict(fields(zlib.decompress(opaque)))
    call = list(fields(message[1]))
    parameters = [next(fields(value)) for number, value in call if number == 5]
    call = dict(call)
    assert (call[3], call[4]) == (1, 1)
    return dict(fields(call[1])), call[2], parameters, message[4].decode()


# Of the parameters: an array, an int of 32 bits and a float.
ARRAY, INT, FLOAT = 1, 3, 7


@every_case
@pytest.mark.usefixtures("plugin")
def test_jaxlib_is_told_of_every_launch(case):
    operands = arrays(case, "bfloat16")
    for reads, writes, opaque in calls(gradient(function(case)), *operands):
        compiled, programs, parameters, name = told(opaque)
        kinds = [kind for kind, _ in parameters]
        assert kinds[: len(reads) + len(writes)] == [ARRAY] * (len(reads) + len(writes))
        assert ARRAY not in kinds[len(reads) + len(writes) :]
        for kind, value in parameters:
            if kind == ARRAY:
                # Nothing is zeroed, and addresses are multiples of 16.
                assert dict(fields(value)).get(1, 0) == 0
                assert dict(fields(value))[2] == 16
            else:
                assert kind in (INT, FLOAT)
                assert value > 0
        if name in ("normwise_forward", "normwise_merge_moments"):
            assert [v for k, v in parameters if k == FLOAT] == pytest.approx([EPSILON])
        code = compiled[4].decode()
        entry = re.search(rf"\.entry {compiled[1].decode()}\((.*?)\)\s", code, re.DOTALL)[1]
        # Triton adds an address of scratch memory, and one for profiles.
        declared = re.findall(r"\.param \.(\w+)", entry)
        widths = {ARRAY: "64", INT: "32", FLOAT: "32"}
        assert [kind[1:] for kind in declared[:-2]] == [widths[kind] for kind in kinds]
        assert len(declared) == len(kinds) + 2
        assert ".target sm_90" in code
        assert compiled[6] == 90
        # One program is no cluster; shared memory is what sums over a program's threads take.
        assert compiled[10] == 1
        assert compiled.get(3, 0) % 4 == 0
        assert (".extern .shared" in code) == (compiled.get(3, 0) > 0)
        assert f".reqntid {32 * compiled[2]}" in code
        assert 0 < programs < 2**31


@pytest.mark.usefixtures("plugin")
def test_jaxlib_reads_the_message():
    call = importlib.import_module("jax_cuda12_plugin._triton")
    ((_, _, opaque),) = calls(ops.layer_norm, X)
    assert call.get_serialized_metadata(opaque) == b""
    with pytest.raises(RuntimeError, match="Failed to uncompress"):
        call.get_serialized_metadata(opaque[:-9])


@pytest.mark.usefixtures("plugin")
def test_kernels_are_compiled_once(monkeypatch):
    messages = calls(gradient(ops.layer_norm), X)
    compiled = []
    monkeypatch.setattr("triton.compile", lambda *args, **options: compiled.append(args))
    assert calls(gradient(ops.layer_norm), X) == messages
    assert compiled == []


@pytest.mark.usefixtures("plugin")
def test_on_rocm_the_code_is_a_file(monkeypatch):
    monkeypatch.setattr(jax_gpu, "device", lambda: DEVICES["rocm"])
    for _, _, opaque in calls(gradient(ops.layer_norm), X, platform="rocm"):
        compiled, _, _, _ = told(opaque)
        path = pathlib.Path(compiled[4].decode())
        assert path.suffix == ".hsaco"
        assert path.read_bytes().startswith(b"\x7fELF")
        path.unlink()
        # There is no compute capability.
        assert 6 not in compiled
    jax_gpu._code.cache_clear()


def test_nobody_imports_triton_on_a_cpu():
    program = (
        "import sys, normwise, numpy as np; normwise.ops.layer_norm(np.ones((2, 3))); "
        "normwise.explain(normwise.ops.layer_norm, (2, 3, 4, 5), axis=(1, 3)); "
        "assert not {'triton', 'torch'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
