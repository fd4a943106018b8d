"""The engine: the loop, its events, and what every run is made of. It knows no handler.

The first names are for everybody; those after `CheckpointError` are for authors of handlers, see docs/handlers.md.
"""

from .arriving import Arriving, ArrivingTensor
from .batch import call_model, cut, first_tensor, move, num_samples, outline, prepare_batch, tree_map
from .callback import Callback
from .checkpoint import (
    PART_DIGESTS,
    CheckpointDirectory,
    CheckpointFile,
    check_plain,
    checkpoint_files,
    keep_checkpoint,
    superseded,
    write_part,
)
from .data import Data, check_data, one_pass, repeat
from .dispatch import Subscription, describe
from .engine import Engine
from .errors import (
    CamshaftError,
    CheckpointError,
    ConfigurationError,
    DataError,
    EngineStateError,
    HandlerError,
    MissingPackageError,
    can_take,
    did_you_mean,
    is_number,
    ran_out_of_memory,
    whole_number,
)
from .events import (
    BatchReady,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    Logged,
    LossReady,
    RunFailed,
    Settled,
    StepEnd,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
)
from .files import (
    directory_for,
    ensure_writable,
    is_plain_name,
    remove_temporaries,
    save_together,
    sync_directory,
    write_durably,
)
from .finite import is_finite, non_finite_outputs
from .history import STAGES, History, values_of
from .in_parts import evaluate_part, train_in_parts
from .losses import FocalLoss, SymmetricCrossEntropy
from .meter import AverageMeter
from .metric import as_metrics
from .optional import import_optional
from .parameters import Selection, decay_groups, is_weight, layer_groups, parameters_of, select_parameters, weights_of
from .ranks import Ranks, Share, launched_rank, launched_world
from .rehearsed import Rehearsal
from .rng import generator_states, preserve_rng, set_generator_states
from .run import Phase, Run
from .sharded import has_shards, is_sharded, local_part, made_whole, shell_of, state_like, take_apart, whole_of
from .stages import NOTHING, CurrentStage
from .state import checkpoints_of, named_callbacks, run_state
from .step import FunctionStep, Step, SupervisedStep
from .trainer import Trainer
from .trial import Trial, asked_trial, lead_files
from .values import format_values, label, scalars
from .weights import average_name, load_weights, unwrap
from .when import NEVER, after, at, every, every_seconds, until

__all__ = [
    "Engine",
    "Trainer",
    "Callback",
    "History",
    "Rehearsal",
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
    "layer_groups",
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
    "Logged",
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
    "EngineStateError",
    "MissingPackageError",
    "CheckpointError",
    # For authors of handlers.
    "describe",
    "did_you_mean",
    "is_number",
    "whole_number",
    "ran_out_of_memory",
    "can_take",
    "import_optional",
    "Ranks",
    "Share",
    "launched_rank",
    "launched_world",
    "Run",
    "Phase",
    "CurrentStage",
    "NOTHING",
    "Step",
    "FunctionStep",
    "SupervisedStep",
    "train_in_parts",
    "evaluate_part",
    "tree_map",
    "move",
    "first_tensor",
    "call_model",
    "cut",
    "outline",
    "Data",
    "check_data",
    "one_pass",
    "Selection",
    "is_weight",
    "parameters_of",
    "select_parameters",
    "weights_of",
    "unwrap",
    "is_finite",
    "non_finite_outputs",
    "Trial",
    "asked_trial",
    "lead_files",
    "load_weights",
    "average_name",
    "is_sharded",
    "has_shards",
    "local_part",
    "made_whole",
    "shell_of",
    "state_like",
    "take_apart",
    "whole_of",
    "as_metrics",
    "scalars",
    "Arriving",
    "ArrivingTensor",
    "format_values",
    "label",
    "values_of",
    "STAGES",
    "directory_for",
    "ensure_writable",
    "is_plain_name",
    "write_durably",
    "save_together",
    "remove_temporaries",
    "sync_directory",
    "CheckpointDirectory",
    "CheckpointFile",
    "checkpoint_files",
    "checkpoints_of",
    "keep_checkpoint",
    "superseded",
    "write_part",
    "PART_DIGESTS",
    "run_state",
    "named_callbacks",
    "NEVER",
    "check_plain",
    "preserve_rng",
    "generator_states",
    "set_generator_states",
]
