"""Handlers: each is one file, and composes with the others through `camshaft.engine` alone."""

from .best_checkpoint import BestCheckpoint
from .early_stopping import EarlyStopping
from .gradients import Accumulate, ClipGradients
from .metrics import Metrics
from .placement import Placement
from .precision import MixedPrecision
from .progress import ProgressBar
from .report import Report
from .run_directory import RunDirectory
from .tensorboard import TensorBoard

__all__ = [
    "Placement",
    "MixedPrecision",
    "Metrics",
    "ProgressBar",
    "EarlyStopping",
    "BestCheckpoint",
    "Accumulate",
    "ClipGradients",
    "TensorBoard",
    "RunDirectory",
    "Report",
]
