"""The gradients of a model's loss, of an evaluation that leaves nothing behind.

A function reads variables and gives a loss. What it would change, as moving statistics, the state
of a seed or a metric, it changes in a scope of Keras's that is thrown away.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from normwise.kernels import private
from normwise.typing import Tensor

# Gives the loss, a tensor (), and other tensors in any structure.
Function = Callable[..., tuple[Tensor | None, Any]]
Evaluation = Callable[..., tuple[Any, list[Tensor]]]


def with_gradients(
    function: Function,
    by: Sequence[keras.Variable],
    reads: Sequence[keras.Variable],
    compiled: bool = True,
) -> Evaluation:
    """A function that gives what another gives beside its loss, and the gradients of the loss.

    Args:
        function: of tensors, in any structures; gives (loss, others). Without `by` the loss may be
            None.
        by: the variables of the gradients, trainable ones.
        reads: every variable that the function reads, those of `by` among them: a program of JAX
            takes them as arguments, and would keep the value of one that is missing here.
        compiled: whether by jax.jit or tf.function, at the first call. PyTorch runs as it is.

    Returns:
        A function of the same arguments that gives (others, gradients), of which there is one for
        each of `by`, of zeros where the loss does not depend on it. It changes no variable.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _of_jax(function, by, reads, compiled)
    if backend == "tensorflow":
        return _of_tensorflow(function, by, reads, compiled)
    if backend == "torch":
        return _of_torch(function, by, reads)
    if by:
        raise ValueError(
            f"Keras's backend {backend} has no gradients; use tensorflow, jax or torch"
        )
    return _without_gradients(function, reads)


def place() -> Any:
    """What traces this call: a tensor made in another place may not leave it.

    Such a place is the body of a loop or of a map over a batch, which a framework traces by itself.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        # Private (0.10 to 0.12). Without it every place is taken for the same.
        context = private.find("jax._src.core.trace_ctx")
        return getattr(context, "trace", None)
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.executing_eagerly():
            return None
        graph = tf.compat.v1.get_default_graph()
        # A map runs its function once in the graph itself, and takes that for a pattern (2.21).
        return object() if "loop_body" in graph.get_name_scope().split("/") else graph
    if backend == "torch":
        peek = private.find(private.TORCH["interpreter"].path)
        return None if peek is None else peek()
    return None


def _of_jax(function, by, reads, compiled) -> Evaluation:
    import jax

    held = _others(reads, by)

    def evaluate(values, held_values, arguments):
        def loss_of(values):
            with _scope([*by, *held], [*values, *held_values]):
                return function(*arguments)

        if not by:
            return loss_of(values)[1], []
        gradients, others = jax.grad(loss_of, has_aux=True)(values)
        return others, gradients

    run = jax.jit(evaluate) if compiled else evaluate
    return lambda *arguments: run(_values(by), _values(held), arguments)


def _of_tensorflow(function, by, reads, compiled) -> Evaluation:
    import tensorflow as tf

    held = _others(reads, by)

    def evaluate(*arguments):
        # No other variable's gradient is to be made on the way.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            values = [tf.convert_to_tensor(value) for value in _values(by)]
            tape.watch(values)
            with _scope([*by, *held], [*values, *_values(held)]):
                loss, others = function(*arguments)
        return others, tape.gradient(loss, values, unconnected_gradients="zero") if by else []

    return tf.function(evaluate, autograph=False) if compiled else evaluate


def _of_torch(function, by, reads) -> Evaluation:
    import torch

    held = _others(reads, by)

    def evaluate(*arguments):
        values = _values(by)
        held_values = [value.detach() for value in _values(held)]
        with torch.set_grad_enabled(bool(by)), _scope([*by, *held], [*values, *held_values]):
            loss, others = function(*arguments)
        if not by:
            return others, []
        # Unlike backward(), it adds to no gradient that a parameter has.
        return others, list(
            torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
        )

    return evaluate


def _without_gradients(function, reads) -> Evaluation:
    def evaluate(*arguments):
        with _scope(reads, _values(reads)):
            return function(*arguments)[1], []

    return evaluate


def _scope(variables, values) -> keras.StatelessScope:
    """Where variables have these values, and what is given to one is lost.

    Each needs its value: Keras takes one that a scope does not know for None in regularizers.
    """
    mapping = list(zip(variables, values, strict=True))
    return keras.StatelessScope(state_mapping=mapping, collect_losses=True)


def _others(variables, taken) -> list[keras.Variable]:
    ids = {id(variable) for variable in taken}
    return [variable for variable in variables if id(variable) not in ids]


def _values(variables) -> list[Tensor]:
    return [variable.value for variable in variables]
