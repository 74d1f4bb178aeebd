"""The native kernels in PyTorch programs: transformations, traces, copies, threads, processes."""

import concurrent.futures
import copy
import os
import pathlib
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from frameworks import allow_torch_compile, assert_within, to_numpy
from plans import norm_of

from normwise import geometry, layers, ops
from normwise.kernels import library

if keras.backend.backend() != "torch":
    pytest.skip("the kernels of another backend", allow_module_level=True)
if library.path() is None:
    pytest.skip("the native library was not built", allow_module_level=True)

import torch

from normwise.kernels import torch as kernel


def assert_same(found, expected, tolerance):
    """Assert equality within a share of each tensor's largest number."""
    for f, e in zip(found, expected, strict=True):
        f, e = (to_numpy(t.detach()) for t in (f, e))
        assert_within(f, e, tolerance * (1 + np.abs(e).max(initial=0)))


def group_norm(x):
    return ops.group_norm(x, groups=3, activation="silu")


def samples(*shape):
    return torch.tensor(np.random.default_rng(0).normal(3, 2, shape))


def slope(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(group_norm(x).sin().sum(), x)


def forward_mode(x, direction):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        return torch.autograd.forward_ad.unpack_dual(group_norm(dual)).tangent


# Torch's own, on the way to forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_transformations_of_torch_see_the_whole_norm():
    """Each would take the kernel, which it cannot see, for a constant."""
    x = samples(2, 4, 5, 6)
    norm = norm_of(geometry.group(x.shape, -1, 3), "float64")
    assert kernel.KERNELS[0].why_not(norm, x) is None
    want, (dx,) = group_norm(x), slope(x)
    assert_same([torch.func.grad(lambda x: group_norm(x).sin().sum())(x)], [dx], 1e-12)
    assert_same([torch.func.vmap(group_norm)(x[None])[0]], [want], 1e-12)
    each = torch.func.vmap(torch.func.grad(lambda x: group_norm(x).sin().sum()))(x[None])
    assert_same(each, [dx], 1e-12)

    # <dx, direction> by both modes.
    direction = torch.cos(x)
    along = (torch.cos(want) * forward_mode(x, direction)).sum()
    assert_same([along], [(dx * direction).sum()], 1e-12)
    _, tangent = torch.func.jvp(group_norm, (x,), (direction,))
    assert_same([tangent], [forward_mode(x, direction)], 1e-12)


def test_a_graph_recorded_from_real_tensors_computes_the_norm():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = samples(2, 4, 5, 6)
    graph = make_fx(group_norm)(x)
    assert_same([graph(2 * x)], [group_norm(2 * x)], 1e-12)


# A cache would only repeat what the trace finds out.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")
@pytest.mark.parametrize(
    "layer",
    [
        layers.GroupNormalization(groups=3, activation="relu"),
        layers.InstanceNormalization(axis=1),
        layers.LayerNormalization(activation="gelu"),
        layers.LayerNormalization(axis=1),
        layers.RMSNormalization(),
    ],
)
def test_torch_compile_takes_a_layer_in_one_graph(layer):
    x = samples(2, 4, 5, 6).float()
    layer(x)
    torch._dynamo.reset()

    def function(x):
        x = x.detach().requires_grad_()
        return x, (layer(x) * 2).sin()

    x, want = function(x)
    compiled = torch.compile(lambda x: (layer(x) * 2).sin(), backend="aot_eager", fullgraph=True)
    y = compiled(x)
    slopes = (torch.autograd.grad(t.sum(), x) for t in (y, want))
    assert_same([y, *next(slopes)], [want, *next(slopes)], 1e-5)


def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5, 6)),
            layers.GroupNormalization(groups=3, activation="relu"),
            keras.layers.Dense(4),
            layers.LayerNormalization(),
        ]
    )


def test_torch_compile_trains_as_eager():
    allow_torch_compile(jit_compile=True)
    x = np.random.default_rng(0).normal(size=(6, 5, 6)).astype("float32")

    def trained(jit_compile):
        made = model()
        made.compile("sgd", "mse", jit_compile=jit_compile)
        before = made.get_weights()
        made.fit(x, x[..., :4], batch_size=2, epochs=3, shuffle=False, verbose=0)
        return before, made.get_weights()

    before, eager = trained(jit_compile=False)
    _, compiled = trained(jit_compile=True)
    for old, one, other in zip(before, eager, compiled, strict=True):
        assert np.abs(one - old).max() > 1e-4
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_model_that_was_trained_natively(copied):
    first, x = model(), samples(4, 5, 6).float()
    first(x).sum().backward()
    twin = copied(first)
    assert_same([twin(x)], [first(x)], 0)
    twin(x).sin().sum().backward()


def test_eight_threads_get_what_one_gets():
    """Large enough for the pool, which serves one caller at a time."""
    x = samples(4, 64, 64, 24).float()

    work = [(group_norm, x), (ops.layer_norm, x.reshape(-1, 96)), (ops.rms_norm, 2 * x)]

    def both_passes(norm, x):
        x = x.detach().requires_grad_()
        y = norm(x)
        return y, *torch.autograd.grad(y.sin().sum(), x)

    want = [both_passes(*job) for job in work]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(both_passes, *work[i % 3]) for i in range(48)]
        for i, job in enumerate(jobs):
            assert_same(job.result(), want[i % 3], 0)


def run(program, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """What each process printed, in order; none outlives the test."""
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [printed for printed, _ in results]


FORKED = """
import os, pathlib, signal, sys
import torch
from normwise import ops

# Threads for the kernels alone: OpenMP's, unlike theirs, are not there again after a fork.
torch.get_num_threads = lambda: int(os.environ["NORMWISE_NUM_THREADS"])
x = torch.sin(torch.arange(2.0**20)).reshape(8, 64, 64, 32).requires_grad_()

def both():
    y = ops.group_norm(x, groups=8)
    return torch.cat([y.detach(), *torch.autograd.grad(y.sin().sum(), x)])

def threads():
    tasks = pathlib.Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else None

want = both()
child = os.fork()
if not child:
    signal.alarm(60)
    before = threads()
    right = torch.equal(both(), want)
    came = threads() is None or threads() - before == int(os.environ["NORMWISE_NUM_THREADS"]) - 1
    os._exit(0 if right and came else 1 if came else 2)
right = torch.equal(both(), want)
_, status = os.waitpid(child, 0)
print(right, os.waitstatus_to_exitcode(status))
torch.save(want, sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_and_the_number_of_threads_change_no_bit(tmp_path):
    """A child has none of its parent's threads, and starts its own."""
    files = [tmp_path / name for name in ("one.pt", "two.pt")]
    processes = [
        run(FORKED, file, NORMWISE_NUM_THREADS=str(count)) for count, file in enumerate(files, 1)
    ]
    assert [printed.split() for printed in finish(*processes)] == [["True", "0"]] * 2
    one, two = map(torch.load, files)
    assert torch.equal(one, two)


DISTRIBUTED = """
import sys, torch
sys.path.insert(0, sys.argv[4])
import test_torch_program as tests
from torch import distributed

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
try:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
except RuntimeError as error:
    print("gloo cannot start:", error)
    sys.exit()
model = tests.model()
tests.train(torch.nn.parallel.DistributedDataParallel(model), tests.halves()[rank])
torch.save([torch.tensor(w) for w in model.get_weights()], f"{out}/{rank}.pt")
distributed.destroy_process_group()
"""


def halves():
    return samples(8, 5, 6).float().chunk(2)


def train(module, x):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (module(x) ** 3).mean().backward()
        optimizer.step()


def test_two_processes_train_as_one(tmp_path):
    alone = model()
    before = [torch.tensor(w) for w in alone.get_weights()]
    train(alone, torch.cat(halves()))
    want = [torch.tensor(w) for w in alone.get_weights()]
    assert all((w - b).abs().max() > 1e-4 for w, b in zip(want, before, strict=True))

    here = pathlib.Path(__file__).parent
    arguments = tmp_path / "store", tmp_path, here
    for printed in finish(*(run(DISTRIBUTED, rank, *arguments) for rank in (0, 1))):
        if "gloo cannot start" in printed:
            pytest.skip(printed.strip())
    for rank in (0, 1):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), want, 1e-5)
