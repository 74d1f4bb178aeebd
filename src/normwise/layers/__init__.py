"""The norms as Keras layers, with TensorFlow Addons' arguments and names."""

from normwise.layers.adaptive import AdaptiveInstanceNormalization
from normwise.layers.global_response import GlobalResponseNormalization
from normwise.layers.group import GroupNormalization, InstanceNormalization
from normwise.layers.layer import LayerNormalization, RMSNormalization
from normwise.layers.modulated import Modulated
from normwise.layers.response import TLU, FilterResponseNormalization
from normwise.layers.reversible import ReversibleInstanceNormalization
from normwise.layers.spade import SPADE
from normwise.layers.spectral import SpectralNormalization
from normwise.layers.standardization import WeightStandardization
from normwise.layers.weight import WeightNormalization

__all__ = [
    "SPADE",
    "TLU",
    "AdaptiveInstanceNormalization",
    "FilterResponseNormalization",
    "GlobalResponseNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "Modulated",
    "RMSNormalization",
    "ReversibleInstanceNormalization",
    "SpectralNormalization",
    "WeightNormalization",
    "WeightStandardization",
]
