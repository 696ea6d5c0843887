"""Upload training data to Cloud Storage once, under the hash of its content.

Each name is imported on first use (PEP 562). Importing the package therefore loads neither Airflow
nor google.cloud: a DAG file pays only for what it uses, and a training container needs no Airflow.

The errors are in `keras_remote_airflow.core.errors`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from keras_remote_airflow.core import __version__

if TYPE_CHECKING:
    from keras_remote_airflow.assets import ref_from_triggering_event
    from keras_remote_airflow.core.cloud.bucket import get_default_project
    from keras_remote_airflow.core.cloud.policy import RetryPolicy
    from keras_remote_airflow.core.data import Data
    from keras_remote_airflow.core.datasets.lookup import CacheEntry, find
    from keras_remote_airflow.core.datasets.materialize import materialize
    from keras_remote_airflow.core.datasets.upload import UploadResult, upload, upload_data
    from keras_remote_airflow.core.refs import is_data_ref, make_data_ref
    from keras_remote_airflow.operators import DataUploadOperator
    from keras_remote_airflow.sensors import CacheSensor

__all__ = [
    "CacheEntry",
    "CacheSensor",
    "Data",
    "DataUploadOperator",
    "RetryPolicy",
    "UploadResult",
    "__version__",
    "find",
    "get_default_project",
    "is_data_ref",
    "make_data_ref",
    "materialize",
    "ref_from_triggering_event",
    "upload",
    "upload_data",
]

# The modules that the names above come from; a test compares the two lists.
_HOME = {
    "CacheEntry": "core.datasets.lookup",
    "CacheSensor": "sensors",
    "Data": "core.data",
    "DataUploadOperator": "operators",
    "RetryPolicy": "core.cloud.policy",
    "UploadResult": "core.datasets.upload",
    "find": "core.datasets.lookup",
    "get_default_project": "core.cloud.bucket",
    "is_data_ref": "core.refs",
    "make_data_ref": "core.refs",
    "materialize": "core.datasets.materialize",
    "ref_from_triggering_event": "assets",
    "upload": "core.datasets.upload",
    "upload_data": "core.datasets.upload",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ImportError as exc:
        # Python's own `from … import …` asks too: it passes an ImportError on, and would replace an
        # AttributeError by a message that says less. All others (`hasattr`, `inspect`, `pickle`)
        # expect an AttributeError.
        if sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap":
            raise
        raise AttributeError(str(exc)) from exc
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
