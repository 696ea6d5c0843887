"""A local Cloud Storage server and pytest fixtures, for this package's tests and for yours.

    from keras_remote_airflow.testing import StorageServer

    with StorageServer(buckets=["demo"]) as server:
        os.environ["STORAGE_EMULATOR_HOST"] = server.url

From a shell: `python -m keras_remote_airflow.testing --port 9023 --bucket demo`. With pytest, use
the fixtures `gcs_server` and `gcs_bucket` (see `plugin`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .buckets import DENIABLE
    from .faults import Fault, Request
    from .objects import StoredObject
    from .server import StorageServer, environment

__all__ = ["DENIABLE", "Fault", "Request", "StorageServer", "StoredObject", "environment"]

_HOMES = {
    "DENIABLE": "buckets",
    "Fault": "faults",
    "Request": "faults",
    "StorageServer": "server",
    "StoredObject": "objects",
    "environment": "server",
}


def __getattr__(name: str) -> Any:
    # Lazily: pytest imports this package for its entry point in every run.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
