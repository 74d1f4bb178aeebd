"""What the public functions and layers take and give, as types."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

# A tensor of the backend, an array of NumPy or a symbol of Keras, which have no type in common.
Tensor: TypeAlias = Any
# A name or a policy of Keras, or a framework's own.
DType: TypeAlias = Any
Shape: TypeAlias = Sequence[int | None]
Axis: TypeAlias = int | Iterable[int]

# A name, a config, or the object itself.
Activation: TypeAlias = str | dict[str, Any] | Callable[[Tensor], Tensor] | None
Initializer: TypeAlias = str | dict[str, Any] | Callable[..., Tensor]
Regularizer: TypeAlias = str | dict[str, Any] | Callable[[Tensor], Tensor] | None
Constraint: TypeAlias = str | dict[str, Any] | Callable[[Tensor], Tensor] | None
