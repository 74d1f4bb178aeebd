"""What a layer that changes weights of its own in a call needs of a framework.

That is a branch by a value, a way out of the loops that a framework traces, and sums over replicas.
"""

import contextlib

import keras
from keras import ops


def choose(condition, if_true, if_false, in_graph=True) -> list:
    """The tensors of `if_true()` or of `if_false()`, which are alike, without gradients.

    The other is not computed, but where there is no value to go by, as under torch.vmap.

    Args:
        condition: bool tensor ().
        if_true, if_false: functions that return a list of tensors.
        in_graph: whether torch.compile can have both in its graph, which then has no break here.
            It cannot where they change Python's objects, as the call of a Keras layer does.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        return _choose_in_torch(condition, if_true, if_false, in_graph)
    if backend == "jax":
        import jax

        if not isinstance(condition, jax.core.Tracer):
            # jax.lax.cond would compile both branches in every call.
            return if_true() if condition else if_false()
    return ops.cond(condition, if_true, if_false)


def _choose_in_torch(condition, if_true, if_false, in_graph):
    import torch

    with torch.no_grad():
        if in_graph and torch.compiler.is_compiling():
            # A branch may return none of the tensors that it uses, but copies.
            return torch.cond(
                condition,
                lambda: [t.clone() for t in if_true()],
                lambda: [t.clone() for t in if_false()],
            )
        try:
            chosen = if_true if condition else if_false
        except RuntimeError:
            pairs = zip(if_true(), if_false(), strict=True)
            return [torch.where(condition, *pair) for pair in pairs]
        return chosen()


def outside_loops(*tensors):
    """A context for values that depend on `tensors` alone and are to be kept in a weight.

    JAX traces the body of a loop, as a recurrent layer's, by itself, and no value of it can be
    kept. In this context the values become part of the program around the loop.
    """
    jax_core = _jax_core()
    if jax_core is None:
        return contextlib.nullcontext()
    traces = [getattr(t, "_trace", jax_core.eval_trace) for t in tensors]
    return jax_core.set_current_trace(max(traces, key=lambda trace: len(list(_around(trace)))))


def in_loop(weight) -> bool:
    """Whether this call is in a loop that JAX traces, where no value can be kept in `weight`."""
    jax_core = _jax_core()
    if jax_core is None:
        return False
    around = _program(getattr(weight, "_trace", jax_core.eval_trace))
    return _program(jax_core.trace_ctx.trace) is not around


def _program(trace):
    """The trace that writes a program, below those of derivatives and batches."""
    enclosing = list(_around(trace))
    return next((each for each in enclosing if hasattr(each, "frame")), enclosing[-1])


def _around(trace):
    """The trace, and those around it."""
    while trace is not None:
        yield trace
        trace = getattr(trace, "parent_trace", None)


def _jax_core():
    """JAX's module of traces, which is private (0.10.2), or None: then all is as if in no loop."""
    if keras.backend.backend() != "jax":
        return None
    try:
        from jax._src import core
    except ImportError:
        return None
    names = ("set_current_trace", "eval_trace", "trace_ctx")
    return core if all(hasattr(core, name) for name in names) else None


def sum_over_replicas(tensors: list, unless) -> list:
    """The tensors' sums over the replicas that train one model at once.

    Those of a tf.distribute strategy, or of torch's DistributedDataParallel, in whose forward pass
    every rank takes part: outside of it a rank may be alone, and would wait for the others forever.
    On JAX one program computes with the whole batch, so that the tensors are their sums already.

    Args:
        tensors: of a replica.
        unless: bool tensor, equal on all replicas; True where the sums are not needed.

    Raises:
        ValueError: in a loop of TensorFlow, where its replicas cannot meet.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _sum_in_tensorflow(tensors)
    if backend == "torch":
        return _sum_in_torch(tensors, unless)
    return tensors


def _sum_in_tensorflow(tensors):
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    try:
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{context.num_replicas_in_sync} replicas cannot meet in a loop, as that of a "
            "recurrent layer, to initialize from the data of all; use data_init=False"
        ) from error


def _sum_in_torch(tensors, unless):
    import torch

    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensors
    parallel = torch.nn.parallel.DistributedDataParallel
    # Private (torch 2.4 to 2.13). Without it all ranks are taken for replicas.
    active = getattr(parallel, "_get_active_ddp_module", None)
    module = None if active is None else active()
    if (active is not None and module is None) or unless:
        return tensors
    group = None if module is None else module.process_group
    sums = [t.detach().clone() for t in tensors]
    for each in sums:
        distributed.all_reduce(each, group=group)
    return sums
