"""Declares the settings of an experiment, and reads them from a YAML file.

    experiment = load(Path("experiments/quickstart.yaml"), ["training.global_batch=16"])

`settings` declares all settings, `file` reads and checks a file, and `plain_yaml` parses YAML.
"""

from selm_jax.config.consistency import user_code_in
from selm_jax.config.file import (
    ConfigError,
    Override,
    as_dict,
    dump,
    load,
    parse,
    read,
    refuse_secrets,
)
from selm_jax.config.kinds import (
    CutOff,
    ExploreName,
    RuleName,
    Ties,
    fixed_length,
    most_in_row,
    objective_at,
)
from selm_jax.config.rollout import Gap, Mixture, Remote, Rollout, SamplingSettings
from selm_jax.config.settings import (
    Candidates,
    Compute,
    Data,
    Evaluation,
    Experiment,
    Feedback,
    Importance,
    Labels,
    Log,
    Lora,
    Model,
    Text,
    Training,
)

__all__ = [
    "Candidates",
    "Compute",
    "ConfigError",
    "CutOff",
    "Data",
    "Evaluation",
    "Experiment",
    "ExploreName",
    "Feedback",
    "Gap",
    "Importance",
    "Labels",
    "Log",
    "Lora",
    "Mixture",
    "Model",
    "Override",
    "Remote",
    "Rollout",
    "RuleName",
    "SamplingSettings",
    "Text",
    "Ties",
    "Training",
    "as_dict",
    "dump",
    "fixed_length",
    "load",
    "most_in_row",
    "objective_at",
    "parse",
    "read",
    "refuse_secrets",
    "user_code_in",
]
