"""What is planned for GPUs, and what Triton compiles it to, on a machine without one."""

import dataclasses
import pathlib
import re
import subprocess

import keras
import pytest

from normwise import geometry
from normwise.activations import Activation
from normwise.kernels import gpu
from normwise.norm import PER_SAMPLE, SHARED, Norm, Operands

if gpu.missing() or gpu.interpreted() or keras.backend.backend() != "torch":
    pytest.skip(
        gpu.missing() or "of Triton alone, and tested beside the backend torch",
        allow_module_level=True,
    )

import triton

from normwise.kernels.gpu import launch, plan

DEVICES = {
    "sm_80": launch.Device("cuda", 80, 32, multiprocessors=108),
    "sm_90": launch.Device("cuda", 90, 32, multiprocessors=132),
    "gfx942": launch.Device("hip", "gfx942", 64, multiprocessors=304),
}
H100 = DEVICES["sm_90"]
# What benchmarks/gpu.py times, and odd sizes of each pattern.
CASES = {
    "ln bert": geometry.layer((64, 512, 1024)),
    "rms llm": geometry.layer((4, 4096, 4096)),
    "ln convnext last": geometry.layer((64, 56, 56, 128)),
    "ln convnext first": geometry.layer((64, 128, 56, 56), 1),
    "gn unet last": geometry.group((32, 64, 64, 320)),
    "gn unet first": geometry.group((32, 320, 64, 64), 1),
    "gn batch 1 last": geometry.group((1, 512, 512, 256)),
    "in style last": geometry.group((16, 256, 256, 64), -1, -1),
    "in style first": geometry.group((16, 64, 256, 256), 1, -1),
    "in 3d last": geometry.group((1, 128, 128, 128, 32), -1, -1),
    "gn resnet last": geometry.group((64, 28, 28, 256)),
    "gn tutorial": geometry.group((32, 26, 26, 10), -1, 5),
    "ln small": geometry.layer((8, 128, 768)),
    "odd rows": geometry.layer((333, 1001)),
    "long rows": geometry.layer((16, 100001)),
    "odd runs": geometry.group((5, 30, 333), 1, 3),
    "odd runs, long": geometry.group((2, 6, 99991), 1, 3),
    "runs of several": geometry.group((5, 3, 30, 333), 2, 3),
    "odd columns": geometry.group((5, 33, 33, 99), -1, 9),
    "odd kept": geometry.layer((5, 99, 31, 33), 1),
    "kept in blocks": geometry.layer((3, 3000, 17), 1),
}
PATTERNS = {
    "ln bert": ("rows.forward", "rows.backward"),
    "ln convnext first": ("kept.forward", "kept.backward"),
    "gn unet first": ("runs.forward", "runs.backward"),
    "gn resnet last": ("whole.forward", "whole.backward"),
    "gn unet last": (
        "pieces.moments",
        "pieces.merge_moments",
        "pieces.apply",
        "pieces.sums",
        "pieces.merge_sums",
        "pieces.gradient",
    ),
    "long rows": (
        "pieces.moments",
        "pieces.merge_moments",
        "pieces.apply",
        "pieces.sums",
        "pieces.merge_sums_of_rows",
        "rows.gradient",
    ),
    "kept in blocks": ("kept.forward", "kept.backward_in_blocks"),
}


# Gamma and beta alone, and all that the kernels take.
FEWEST = Operands(SHARED, SHARED)
MOST = Operands(PER_SAMPLE, PER_SAMPLE, residual=True)
few_and_most = pytest.mark.parametrize("operands", [FEWEST, MOST], ids=["fewest", "most"])


def norm_of(name, dtype="bfloat16", activation="identity", operands=FEWEST):
    is_rms = name.startswith("rms")
    return Norm(CASES[name], dtype, dtype, 1e-3, not is_rms, Activation(activation), operands)


def launches_of(norm, device):
    forward = plan.forward(norm, device)
    backward = plan.backward(norm, device, True, True, dsum=bool(norm.operands.residual))
    return (*forward.launches, *backward.launches)


def spilled(kernel, tmp_path):
    """The bytes, or on AMD the registers, that a compiled kernel moves out of registers."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[1])
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [tools / "cuobjdump", "--dump-resource-usage", binary]
    usage = subprocess.run(command, capture_output=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout.decode())[1])


# All operands for one target only: a compilation takes a second.
@pytest.mark.parametrize(
    ("target", "operands"),
    [*((target, FEWEST) for target in DEVICES), ("sm_90", MOST)],
    ids=[*DEVICES, "sm_90, most"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_every_launch_compiles_without_a_spill(target, name, dtype, operands, tmp_path):
    norm = norm_of(name, dtype, operands=operands)
    for each in launches_of(norm, DEVICES[target]):
        kernel = launch.compiled(each, launch.dtypes_of(norm), DEVICES[target])
        assert spilled(kernel, tmp_path) == 0, each


@pytest.mark.parametrize(
    "activation", ["leaky_relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh"]
)
@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "gn unet last"])
def test_activations_compile(name, activation):
    norm = norm_of(name, "float16", activation)
    for each in launches_of(norm, H100):
        launch.compiled(each, launch.dtypes_of(norm), H100)


@pytest.mark.parametrize("name", ["gn unet first", "gn unet last", "long rows"])
def test_nan_passes_a_maximum(name):
    """A GPU's own drops it, and Triton's interpreter does not."""
    norm = norm_of(name)
    for each in launches_of(norm, H100):
        kernel = launch.compiled(each, launch.dtypes_of(norm), H100)
        assert not re.search(r"m(ax|in)\.f32", kernel.asm["ptx"])


HUGE = {
    "rows": geometry.layer((2**31 - 1000, 2)),
    "a row": geometry.layer((1, 65536, 32769), (1, 2)),
    "channels last": geometry.group((1, 128, 128, 131073), -1, -1),
    "runs": geometry.group((3, 4, 2**30), 1, 2),
    "kept": geometry.layer((3, 70000, 40000), 1),
}


@few_and_most
@pytest.mark.parametrize("name", HUGE)
def test_places_past_32_bits(name, operands):
    """No product with an extent is taken in 32 bits that needs more."""
    norm = dataclasses.replace(norm_of("ln bert", operands=operands), geometry=HUGE[name])
    for each in launches_of(norm, H100):
        launch.compiled(each, launch.dtypes_of(norm), H100)


@pytest.mark.parametrize("name", ["ln bert", "gn unet last", "odd rows"])
def test_addresses_that_are_not_aligned(name):
    norm = norm_of(name)
    for each in launches_of(norm, H100):
        kernel = launch.compiled(each, launch.dtypes_of(norm), H100, aligned=False)
        widest = [
            int(bits) for bits in re.findall(r"ld\.global[^;]*\.v\d\.b(\d+)", kernel.asm["ptx"])
        ]
        assert not widest


def test_aligned_rows_are_read_16_bytes_at_a_time():
    norm = norm_of("ln bert")
    kernel = launch.compiled(launches_of(norm, H100)[0], launch.dtypes_of(norm), H100)
    assert re.search(r"ld\.global[^;]*\.v4\.b32", kernel.asm["ptx"])


def test_a_kernel_is_compiled_once_for_batches_of_any_size():
    norm = norm_of("ln bert")
    of_others = dataclasses.replace(norm, geometry=geometry.layer((48, 512, 1024)))
    kernels = {
        id(launch.compiled(launches_of(each, H100)[0], launch.dtypes_of(each), H100))
        for each in (norm, of_others)
    }
    assert len(kernels) == 1


@few_and_most
@pytest.mark.parametrize(("name", "kernels"), PATTERNS.items())
def test_which_kernels_run(name, kernels, operands):
    found = [
        f"{each.kernel.__module__.rpartition('.')[2]}.{each.kernel.__name__}"
        for each in launches_of(norm_of(name, operands=operands), H100)
    ]
    assert found == [*kernels, "pieces.sum_parameters"]


@few_and_most
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_complete(name, operands):
    """What a launch reads is given or was written, and what is asked for is written."""
    norm = norm_of(name, operands=operands)
    adds = bool(operands.residual)
    for made, given, results in (
        (
            plan.forward(norm, H100),
            {"x", "gamma", "beta"} | ({"residual"} if adds else set()),
            {"y", "statistics"} | ({"sum"} if adds else set()),
        ),
        (
            plan.backward(norm, H100, True, True, dsum=adds),
            {"x", "gamma", "beta", "statistics", "dy"} | ({"dsum"} if adds else set()),
            {"dx", "dgamma", "dbeta"},
        ),
    ):
        known = set(given)
        for each in made.launches:
            assert set(each.reads) - {None} <= known
            assert set(each.writes) - {None} <= results | set(made.scratch)
            known |= set(each.writes)
        assert given <= {name for each in made.launches for name in each.reads}
        for each in made.launches:
            assert 0 < each.programs < 2**31
            assert each.threads & (each.threads - 1) == 0
        assert results <= known
        assert set(made.scratch) <= known


@few_and_most
@pytest.mark.parametrize("name", [n for n, g in CASES.items() if g.shape[0] > 1])
def test_a_sample_is_planned_alike_in_every_batch(name, operands):
    norm = norm_of(name, operands=operands)
    alone = dataclasses.replace(
        norm, geometry=dataclasses.replace(norm.geometry, shape=(1, *norm.geometry.shape[1:]))
    )
    for pair in zip(launches_of(norm, H100), launches_of(alone, H100), strict=True):
        if pair[0].kernel.__name__ == "sum_parameters" and not norm.per_sample:
            continue
        many, one = pair
        assert (many.kernel, many.constants, many.threads) == (
            one.kernel,
            one.constants,
            one.threads,
        )
        if norm.per_sample:
            # In what order dgamma and dbeta are summed is told by numbers.
            assert (many.numbers, many.programs) == (
                one.numbers,
                one.programs * norm.geometry.shape[0],
            )


def test_what_no_gradient_asks_for_is_not_planned():
    norm = norm_of("gn unet last")
    made = plan.backward(norm, H100, dgamma=False, dbeta=False)
    assert [each.kernel.__name__ for each in made.launches] == ["sums", "merge_sums", "gradient"]
    assert "sums" not in made.scratch
    made = plan.backward(norm, H100, dgamma=False, dbeta=True)
    assert made.launches[-1].writes == (None, "dbeta")


def test_large_inputs_have_wide_numbers():
    norm = dataclasses.replace(norm_of("ln bert"), geometry=geometry.layer((3 * 2**31, 1024)))
    signature = launches_of(norm, H100)[0].source(launch.dtypes_of(norm)).signature
    assert signature["outer"] == "i64"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x_dtype": "float64"}, "float64 has no Triton kernel"),
        ({"operands": Operands(mask=True)}, "take no mask"),
        ({"operands": Operands(learned_epsilon=True)}, "take no learned epsilon"),
        ({"geometry": geometry.layer((2, 3, 4, 5), (1, 3))}, "not neighbouring axes"),
        ({"geometry": geometry.layer((0, 4))}, "x is empty"),
    ],
)
def test_what_the_kernels_do_not_take(changes, reason):
    norm = dataclasses.replace(norm_of("ln bert"), **changes)
    assert reason in gpu.why_not(norm)
    assert gpu.why_not(norm_of("ln bert")) is None
    assert gpu.why_not(norm_of("ln bert", operands=MOST)) is None


def test_a_sample_has_few_sums():
    """Of many short samples they would take as many bytes as x."""
    norm = dataclasses.replace(
        norm_of("ln bert", operands=MOST), geometry=geometry.layer((256, 256, 1152))
    )
    made = plan.backward(norm, H100, True, True)
    assert made.scratch["sums"] * 16 <= 256 * 256 * 1152
