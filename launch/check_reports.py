"""`--report_to`: names of trackers, refused before training where their package is missing."""

from __future__ import annotations

import argparse

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest
from mm_moe.training.reporting import CSV

NONE, ALL = "none", "all"
PACKAGES = {  # where it is not the name
    "azure_ml": "azureml-mlflow",
    "comet_ml": "comet-ml",
    "flyte": "flytekit",
    "kubeflow": "kubeflow-trainer-api",
}


def wanted_trackers(values: argparse.Namespace) -> list[str]:
    """The trackers that `--report_to` asks for: several words, or one with commas.

    "all" means all that are installed, and "csv".

    Raises:
        ConfigError: an unknown name, or a package that is not installed (with the line that
            installs it).
    """
    given = values.report_to or []
    words = given.split() if isinstance(given, str) else given
    names = [name for word in words for name in str(word).split(",") if name]
    installed = get_available_reporting_integrations()
    if ALL in names:
        return [*installed, CSV]
    names = [name for name in dict.fromkeys(names) if name != NONE]
    for name in names:
        if name != CSV and name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"unknown --report_to {name!r}; {nearest(name, [*INTEGRATION_TO_CALLBACK, CSV])}"
            )
        if name != CSV and name not in installed:
            raise ConfigError(
                f"--report_to {name} needs a package that is not installed: "
                f"pip install {PACKAGES.get(name, name)}. metrics.jsonl is written in any case."
            )
    return names
