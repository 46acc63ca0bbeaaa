"""Track runs with MLflow: one MLflow run for each run, in one experiment.

MLflow's client, unlike its module, adds no tags of its own, so a run has neither user's name nor command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from haq_lab.tracking.run_folder import RunFolder
from haq_lab.tracking.tracker import flat_settings, interactive
from haq_lab.utils.errors import UserError
from haq_lab.utils.extras import need

if TYPE_CHECKING:
    import pandas as pd

MAX_PARAMS = 100  # that MLflow takes in one request
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # a run does not wait


@dataclass
class MLflow:
    """Tracker that sends runs to MLflow.

    Args:
        experiment: The MLflow experiment. It is created if necessary.
        uri: The server or store, such as `http://host:5000`. None: the environment variable `MLFLOW_TRACKING_URI`.

    Raises:
        UserError: MLflow is not installed, or no server is named.
    """

    experiment: str = "haq_lab"
    uri: str | None = None

    def __post_init__(self) -> None:
        need("tracking=mlflow", "mlflow", "mlflow")
        if not (self.uri or os.environ.get("MLFLOW_TRACKING_URI")):
            raise UserError("tracking.mlflow.uri: a value is needed. Name a server or set MLFLOW_TRACKING_URI.")

    def start(self, folder: RunFolder, name: str, group: str | None) -> None:
        """Create an MLflow run. The settings are its params."""
        os.environ.update(PATIENCE | os.environ)
        from mlflow import MlflowClient, entities

        self._client = MlflowClient(self.uri)
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self.experiment)
        tags = {} if group is None else {"group": group}
        self._run = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        params = [entities.Param(key, str(value)) for key, value in flat_settings(folder.config).items()]
        for first in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + MAX_PARAMS])

    def metrics(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._run, metrics=[Metric(name, value, 0, 0) for name, value in values.items()])

    def table(self, name: str, content: pd.DataFrame) -> None:
        self._client.log_table(self._run, content, f"tables/{name}.json")

    def figure(self, path: Path) -> None:
        if (drawn := interactive(path)) is None:
            self._client.log_artifact(self._run, str(path), "figures")
        else:
            self._client.log_figure(self._run, drawn, f"figures/{path.name.partition('.')[0]}.html")

    def artifact(self, path: Path, kind: str) -> None:
        self._client.log_artifact(self._run, str(path), kind)

    def finish(self) -> None:
        self._client.set_terminated(self._run)
