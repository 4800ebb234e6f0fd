"""What the `tracking` section of a config file may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raytune_ft.config.section import Positive, Section

TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]
PACKAGES: dict[str, str] = {
    "tensorboard": "tensorboardX",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "trackio": "trackio",
}


class TrackingConfig(Section):
    """Where metrics go beside metrics.jsonl. Nothing here changes the numbers."""

    to: list[TrackerName] = Field(
        ["tensorboard"],
        description="any of tensorboard (event files in the run's directory), mlflow, wandb and "
        "trackio; keys and passwords of servers come from the environment alone",
    )
    project: str = Field(
        "raytune-ft",
        min_length=1,
        description="project of wandb and trackio; mlflow's experiment is PROJECT/SWEEP",
    )
    uri: str | None = Field(
        None, description="mlflow: the server's address; null is MLFLOW_TRACKING_URI"
    )
    every_steps: Positive = Field(
        1, description="of the steps, one in this many; evaluations all go"
    )
