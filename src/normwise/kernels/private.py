"""What is private in the frameworks, in one place: the names, and the versions that had them.

A version without one of them gets no native kernel, and `normwise.explain` says why.
"""

import importlib
import typing


class Private(typing.NamedTuple):
    """A private name of a framework.

    Args:
        path: its full name.
        seen: the versions that it was seen in.
        tells: what normwise learns by it.
    """

    path: str
    seen: str
    tells: str


TORCH = {
    "interpreter": Private(
        "torch._C._functorch.peek_interpreter_stack", "2.13", "whether torch.func transforms a call"
    ),
    "dual_level": Private(
        "torch.autograd.forward_ad._current_level",
        "2.13",
        "whether forward-mode derivatives are taken",
    ),
    "modes": Private(
        "torch._C._len_torch_dispatch_stack", "2.13", "whether a dispatch mode watches a call"
    ),
}

JAX = {
    "devices": Private(
        "jax._src.dispatch.prim_requires_devices_during_lowering",
        "0.10.2 to 0.12",
        "the devices that a program is made for",
    ),
    "for_export": Private(
        "jax._src.interpreters.mlir.LoweringParameters.for_export",
        "0.10.2 to 0.12",
        "whether a program is to be exported",
    ),
    "checks": Private("jax._src.checkify.error_checks", "0.10.2 to 0.12", "of checkify"),
    "nan_check": Private("jax._src.checkify.nan_error_check", "0.10.2 to 0.12", "of checkify"),
    "jets": Private("jax.experimental.jet.jet_rules", "0.10.2 to 0.12", "of jet"),
}

# The call of Triton's kernels, which comes with JAX's plugin for GPUs.
JAX_GPU = {
    name: Private(
        f"jaxlib.gpu_triton.{path}",
        "0.10.0 to 0.12 with its plugin for GPUs",
        "how to launch Triton's kernels",
    )
    for name, path in {
        "kernel": "TritonKernel",
        "call": "TritonKernelCall",
        "array": "create_array_parameter",
        "scalar": "create_scalar_parameter",
    }.items()
}
# Where there is one of these, the call can be recorded in a command buffer: in 0.10.1 to 0.12.
JAX_GPU_RECORDED = (
    "jaxlib.gpu_triton._cuda_triton.registrations",
    "jaxlib.gpu_triton._hip_triton.registrations",
)

TENSORFLOW = {
    "in_xla": Private(
        "tensorflow.python.ops.control_flow_util.GraphOrParentsInXlaContext",
        "2.21",
        "whether XLA compiles a function",
    ),
}


def find(path: str):
    """The object of this full name, None where there is none."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def missing(names: dict[str, Private]) -> str | None:
    """Why the native kernels cannot be called on a framework that lacks one of `names`, or None."""
    for path, seen, tells in names.values():
        if find(path) is None:
            framework = path.partition(".")[0]
            version = importlib.import_module(framework).__version__
            return (
                f"{framework} {version} lacks {path}, by which normwise learns {tells}; "
                f"{framework} {seen} has it"
            )
    return None
