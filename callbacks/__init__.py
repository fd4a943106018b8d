"""Handlers: each is one file, and works with the others only through `camshaft.engine`."""

from .batch_size_finder import BatchSizeFinder
from .best_checkpoint import BestCheckpoint
from .compile import Compile
from .cross_validation import CrossValidation, cross_validate
from .deterministic import Deterministic
from .distributed import Distributed
from .early_stopping import EarlyStopping
from .export import Export
from .fingerprint import Fingerprint
from .gradients import Accumulate, ClipGradients
from .ignite import Ignite
from .images import Images
from .learning_rate_finder import LearningRateFinder
from .live_curves import LiveCurves
from .log import Log
from .metrics import Metrics
from .micro_batch import MicroBatch
from .monitor import Monitor
from .non_finite import StopOnNonFinite
from .placement import Placement
from .precision import MixedPrecision
from .profile import Profile
from .progress import ProgressBar
from .prune import Prune
from .ramp import Ramp
from .recompute import Recompute
from .regularization import FreezeUntil, Penalty
from .report import Report
from .rollback import Rollback
from .run_checkpoint import RunCheckpoint
from .run_directory import RunDirectory
from .schedule import Schedule
from .steering import Steering
from .stop_after import StopAfter
from .summary import Summary
from .tensorboard import TensorBoard
from .track_clearml import ClearML
from .track_comet import Comet
from .track_json_lines import JsonLines
from .track_mlflow import MLflow
from .track_neptune import Neptune
from .track_wandb import WandB
from .tracker import Service, Tracker
from .warmup import warmup_cosine
from .weight_average import WeightAverage

__all__ = [
    "Distributed",
    "Placement",
    "MixedPrecision",
    "Compile",
    "Recompute",
    "Deterministic",
    "Metrics",
    "ProgressBar",
    "LiveCurves",
    "EarlyStopping",
    "BestCheckpoint",
    "RunCheckpoint",
    "Accumulate",
    "ClipGradients",
    "MicroBatch",
    "StopAfter",
    "Steering",
    "Prune",
    "Schedule",
    "Ramp",
    "warmup_cosine",
    "WeightAverage",
    "Penalty",
    "FreezeUntil",
    "StopOnNonFinite",
    "Rollback",
    "LearningRateFinder",
    "BatchSizeFinder",
    "cross_validate",
    "CrossValidation",
    "Summary",
    "Log",
    "TensorBoard",
    "Images",
    "Tracker",
    "Service",
    "JsonLines",
    "WandB",
    "MLflow",
    "Comet",
    "ClearML",
    "Neptune",
    "Ignite",
    "RunDirectory",
    "Report",
    "Profile",
    "Fingerprint",
    "Export",
    # For authors of handlers.
    "Monitor",
]
