"""Whole models: which norms one has, and other norms in their place."""

from normwise.models.norms import Norm, norms_of
from normwise.models.report import Record, Report

__all__ = ["Norm", "Record", "Report", "norms_of"]
