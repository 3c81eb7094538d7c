"""Training: sharded state, optimizer, data, checkpoints and the loop."""

from zero.data import DataConfig
from zero.metrics import Metrics
from zero.optimizer import OptimizerConfig, ZeroConfig, ZeroOptimizer
from zero.schedule import ScheduleConfig
from zero.trainer import Trainer, TrainerConfig

__all__ = [
    "DataConfig",
    "Metrics",
    "OptimizerConfig",
    "ScheduleConfig",
    "Trainer",
    "TrainerConfig",
    "ZeroConfig",
    "ZeroOptimizer",
]
