"""The norms as Keras layers, with TensorFlow Addons' arguments and names."""

from normwise.layers.group import GroupNormalization, InstanceNormalization
from normwise.layers.layer import LayerNormalization, RMSNormalization

__all__ = [
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
]
