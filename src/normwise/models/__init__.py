"""Whole models: which norms one has, and other norms in their place."""

from normwise.models.acceleration import accelerate
from normwise.models.folding import fold_batch_norm
from normwise.models.freezing import freeze, unfreeze
from normwise.models.norms import KINDS, Norm, norms_of
from normwise.models.replacement import replace_batch_norm
from normwise.models.report import Record, Report

__all__ = [
    "KINDS",
    "Norm",
    "Record",
    "Report",
    "accelerate",
    "fold_batch_norm",
    "freeze",
    "norms_of",
    "replace_batch_norm",
    "unfreeze",
]
