"""Training: configuration, the loop, checkpoints and run folders."""

from ikem_fast.engine.checkpoints import CheckpointError, load_run
from ikem_fast.engine.config import Config, ConfigError, load_config, preset_names
from ikem_fast.engine.interruption import TrainingInterrupted
from ikem_fast.engine.loop import NonFiniteError
from ikem_fast.engine.run_log import LogError, read_log
from ikem_fast.engine.runs import RunError, distill, pretrain
from ikem_fast.engine.world import RankError, joined

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "LogError",
    "NonFiniteError",
    "RankError",
    "RunError",
    "TrainingInterrupted",
    "distill",
    "joined",
    "load_config",
    "load_run",
    "preset_names",
    "pretrain",
    "read_log",
]
