"""Track runs with MLflow: one MLflow run for each run, in one experiment.

The runs go to the server or folder that `uri` or `MLFLOW_TRACKING_URI` names. MLflow's client adds no tags of its own
here, so a run has neither the user's name nor the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from haq_lab.tracking.run_folder import RunFolder
from haq_lab.tracking.tracker import INTERACTIVE, flat_settings
from haq_lab.utils.extras import need

if TYPE_CHECKING:
    import pandas as pd

MAX_PARAMS, MAX_METRICS = 100, 1000  # that MLflow takes in one request
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # a run does not wait


@dataclass
class MLflow:
    """Tracker that sends runs to MLflow.

    Args:
        experiment: The MLflow experiment. It is created if necessary.
        uri: The tracking server or store, such as `http://host:5000`. None: the environment variable
            `MLFLOW_TRACKING_URI`, or MLflow's default in the current folder.

    Raises:
        UserError: MLflow is not installed.
    """

    experiment: str = "haq_lab"
    uri: str | None = None

    def __post_init__(self) -> None:
        need("tracking=mlflow", "mlflow", "mlflow")

    def start(self, folder: RunFolder, name: str, group: str | None) -> None:
        """Create an MLflow run. The settings are its params."""
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(self.uri)
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self.experiment)
        tags = {} if group is None else {"group": group}
        self._run = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in flat_settings(folder.config).items()]
        for first in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + MAX_PARAMS])

    def metrics(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, timestamp=0, step=0) for name, value in values.items()]
        for first in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._run, metrics=metrics[first : first + MAX_METRICS])

    def table(self, name: str, content: pd.DataFrame) -> None:
        self._client.log_table(self._run, content, f"tables/{name}.json")

    def figure(self, path: Path) -> None:
        if not path.name.endswith(INTERACTIVE):
            self._client.log_artifact(self._run, str(path), "figures")
            return
        from plotly.io import read_json

        self._client.log_figure(self._run, read_json(path), f"figures/{path.name.removesuffix(INTERACTIVE)}.html")

    def artifact(self, path: Path, kind: str) -> None:
        self._client.log_artifact(self._run, str(path), kind)

    def finish(self) -> None:
        self._client.set_terminated(self._run)
