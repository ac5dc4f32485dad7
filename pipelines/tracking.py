"""MLflow: one run a stage, nested under one parent; written by the driver alone (a SQLite file has one writer)."""

from dataclasses import dataclass

from pipelines.settings import operational


@dataclass
class TrackingSettings:
    """Section `tracking`."""

    uri: str = operational("sqlite:///runs/mlflow.db", "MLflow store: a sqlite:/// file, or the http:// address of a server")
    experiment: str = operational("mar-ray", "MLflow experiment")
    artifacts: str = operational("", "root of the artefacts; empty: beside the SQLite file, or what the server says")
