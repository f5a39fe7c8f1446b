"""Settings of the commands: one frozen dataclass each.

These classes define the flags, the YAML files and the `training_config.json` that a run writes. A command
reads `--config FILE.yaml` first; flags override it.
"""

from adni_ldm.config.app import AppConfig
from adni_ldm.config.classes import class_names
from adni_ldm.config.data import CheckConfig, ForgetConfig, PhantomConfig, ScansConfig
from adni_ldm.config.datasets import DatasetConfig
from adni_ldm.config.evaluation import EvaluateConfig
from adni_ldm.config.hub import PushConfig, PushSamplesConfig
from adni_ldm.config.parsing import parse_config, run_command
from adni_ldm.config.sampling import SampleConfig
from adni_ldm.config.training import (
    TrainingConfig,
    TrainLDMConfig,
    TrainVAEConfig,
    save_config,
    settings_to_keep,
)
