"""An engine on JAX whose arrays lie on several devices: how XLA splits its passes."""

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from normwise.kernels import sharded

_PARAMETERS = ("parameter", "parameter")


def passes(forward, backward):
    """Both passes of an engine, for arrays that lie on one device or on several."""
    return (
        _partitionable(
            forward, sharded.forward, ("x", *_PARAMETERS, "x"), ("x", "statistics", "x")
        ),
        _partitionable(
            backward,
            sharded.backward,
            ("x", *_PARAMETERS, "statistics", "x", "x"),
            ("x", *_PARAMETERS),
        ),
    )


def _partitionable(native, elsewhere, operand_kinds, result_kinds):
    """Let XLA split an engine's pass over devices, whichever axes of x it splits.

    Args:
        native: the pass where every set lies on one device, called with operands and a Norm.
        elsewhere: the same where not, of sharded.py.
        operand_kinds, result_kinds: of each operand and result: whether it lies as "x" does, as a
            "parameter" or as the "statistics".
    """

    def axes_of(kind, norm, rank):
        """The axes of x that those of an operand go along with; None for one of its own."""
        outer_end, before_end, channels_end = norm.geometry.ends
        axes = tuple(range(rank))
        if kind == "x":
            return axes
        if kind == "parameter":
            of_sample = axes[before_end:channels_end]
            return (0, *of_sample) if norm.per_sample else of_sample
        kept = axes[channels_end:] if norm.geometry.keeps_after else (None,)
        return (*axes[:outer_end], None, *kept)

    def shardings(norm, mesh, operands, results):
        x = operands[0]
        rank = len(x.shape)
        spec = (*x.sharding.spec, *[None] * rank)[:rank]

        def sharding(kind, array):
            # What is absent has no axis to split.
            axes = () if tuple(array.shape) == (0,) else axes_of(kind, norm, rank)
            split = PartitionSpec(*(None if axis is None else spec[axis] for axis in axes))
            return NamedSharding(mesh, split)

        return (
            tuple(map(sharding, operand_kinds, operands)),
            tuple(map(sharding, result_kinds, results)),
        )

    def infer(norm, mesh, operands, results):
        return shardings(norm, mesh, operands, results)[1]

    def partition(norm, mesh, operands, results):
        before, after = shardings(norm, mesh, operands, results)
        names = tuple(
            () if part is None else (part,) if isinstance(part, str) else tuple(part)
            for part in before[0].spec
        )
        split = sharded.Split(operands[0].shape, names)
        outer = split.over(range(norm.geometry.ends[0]))
        # What all samples share, or all outers of one sample.
        shared = split.over(range(int(norm.per_sample), norm.geometry.ends[0]))

        def on_shard(*operands):
            if split.over(range(len(names))) != outer:
                return elsewhere(norm, *operands, split=split)
            return tuple(
                jax.lax.psum(result, shared) if kind == "parameter" and shared else result
                for result, kind in zip(native(*operands, norm), result_kinds, strict=True)
            )

        return mesh, on_shard, after, before

    def rule(norm, mesh, operands, results):
        rank, alone = len(operands[0].shape), []

        def factors(kind, shape):
            axes = axes_of(kind, norm, rank) if shape != (0,) else (None,)
            for axis in axes:
                if axis is None:
                    alone.append(f"alone{len(alone)}")
                yield alone[-1] if axis is None else f"x{axis}"

        sides = (
            ", ".join(
                " ".join(factors(kind, tuple(t.shape))) for kind, t in zip(*side, strict=True)
            )
            for side in ((operand_kinds, operands), (result_kinds, results))
        )
        return " -> ".join(sides), {"need_replication_factors": tuple(alone)}

    call = custom_partitioning(native, static_argnums=(len(operand_kinds),))
    call.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return call
