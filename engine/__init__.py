"""The engine: the loop, its events, and what every run is made of. It knows no handler."""

from .batch import num_samples, prepare_batch
from .callback import Callback
from .dispatch import Subscription
from .engine import Engine
from .errors import (
    CamshaftError,
    CheckpointError,
    ConfigurationError,
    DataError,
    EngineStateError,
    HandlerError,
)
from .events import (
    BatchReady,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    LossReady,
    RunFailed,
    Settled,
    StepEnd,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
)
from .history import History
from .losses import FocalLoss, SymmetricCrossEntropy
from .order import repeat
from .parameters import decay_groups
from .record import AverageMeter
from .trainer import Trainer
from .when import after, at, every, every_seconds, until

__all__ = [
    "Engine",
    "Trainer",
    "Callback",
    "History",
    "AverageMeter",
    "FocalLoss",
    "SymmetricCrossEntropy",
    "every",
    "at",
    "after",
    "until",
    "every_seconds",
    "repeat",
    "decay_groups",
    "prepare_batch",
    "num_samples",
    "Event",
    "FitStart",
    "EpochStart",
    "BatchReady",
    "LossReady",
    "GradientsReady",
    "UpdateEnd",
    "StepEnd",
    "ValidationStart",
    "ValidationStepEnd",
    "ValidationEnd",
    "EpochEnd",
    "Settled",
    "RunFailed",
    "FitEnd",
    "Subscription",
    "CamshaftError",
    "ConfigurationError",
    "HandlerError",
    "DataError",
    "CheckpointError",
    "EngineStateError",
]
