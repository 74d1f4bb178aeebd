"""Whole models: their norms replaced, folded away, frozen, and watched in training."""

from normwise.models.acceleration import accelerate
from normwise.models.folding import fold_batch_norm
from normwise.models.freezing import freeze, unfreeze
from normwise.models.monitor import NormMonitor
from normwise.models.norms import KINDS, Norm, norms_of
from normwise.models.readings import Reading
from normwise.models.replacement import replace_batch_norm
from normwise.models.report import Record, Report

__all__ = [
    "KINDS",
    "Norm",
    "NormMonitor",
    "Reading",
    "Record",
    "Report",
    "accelerate",
    "fold_batch_norm",
    "freeze",
    "norms_of",
    "replace_batch_norm",
    "unfreeze",
]
