"""Track runs with trackio: one trackio run for each run, on this machine or in a Space of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from haq_lab.tracking.run_folder import RunFolder
from haq_lab.tracking.tracker import artifact_name, flat_settings, interactive
from haq_lab.utils.extras import need

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Trackio:
    """Tracker that records runs with trackio, in `TRACKIO_DIR` or its default on this machine.

    Args:
        project: The trackio project.
        space_id: A Space, such as `ORGANISATION/NAME`, to which the run is uploaded. None: this machine.
        private: `tracking.private`: whether the user's name on the hub is left out.

    Raises:
        UserError: trackio is not installed.
    """

    project: str = "haq_lab"
    space_id: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        need("tracking=trackio", "trackio", "trackio")

    def start(self, folder: RunFolder, name: str, group: str | None) -> None:
        """Begin a trackio run. All is logged as one step, at its end."""
        import trackio

        self._content: dict[str, Any] = {}
        config = flat_settings(folder.config)
        off: dict[str, Any] = dict.fromkeys(("embed", "auto_log_gpu", "auto_log_cpu"), False)  # the run is over
        with redirect_stdout(StringIO()):  # trackio prints what it does
            run = trackio.init(self.project, name, group, space_id=self.space_id, config=config, **off)
        if self.private:
            run.config["_Username"] = None  # it is sent with the first step

    def metrics(self, values: Mapping[str, float]) -> None:
        self._content |= values

    def table(self, name: str, content: pd.DataFrame) -> None:
        import trackio

        self._content[name] = trackio.Table(dataframe=content.astype(object).where(content.notna(), None))

    def figure(self, path: Path) -> None:
        import trackio

        drawn = interactive(path)
        name = f"figures/{path.name.partition('.')[0]}"
        self._content[name] = trackio.Image(path) if drawn is None else trackio.Html(drawn)

    def artifact(self, path: Path, kind: str) -> None:
        import trackio

        with redirect_stdout(StringIO()):
            trackio.log_artifact(path, artifact_name(path, kind), kind)

    def finish(self) -> None:
        import trackio

        with redirect_stdout(StringIO()):
            trackio.log(self._content)
            trackio.finish()
