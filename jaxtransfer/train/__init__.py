"""One training state, one update rule, one place that compiles."""

from jaxtransfer.train import metrics
from jaxtransfer.train.checkpoint import Checkpointer, DamagedCheckpointError
from jaxtransfer.train.evaluate import evaluate_batches
from jaxtransfer.train.folders import check_folder
from jaxtransfer.train.logging import read_metrics
from jaxtransfer.train.loop import History, NonFiniteLossError, fit
from jaxtransfer.train.scan import ScanHistory, paired, resident, scan_fit
from jaxtransfer.train.state import TrainState, init_state
from jaxtransfer.train.step import alternate, eval_step, train_step

__all__ = [
    "Checkpointer",
    "DamagedCheckpointError",
    "History",
    "NonFiniteLossError",
    "ScanHistory",
    "TrainState",
    "alternate",
    "check_folder",
    "eval_step",
    "evaluate_batches",
    "fit",
    "init_state",
    "metrics",
    "paired",
    "read_metrics",
    "resident",
    "scan_fit",
    "train_step",
]
