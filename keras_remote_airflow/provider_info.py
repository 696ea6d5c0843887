"""What Airflow's provider manager learns of this package (entry point `apache_airflow_provider`).

Imports nothing that may be missing, because Airflow loads this file on every installation.
"""

from typing import Any

from keras_remote_airflow._requirements import missing_requirement


def get_provider_info() -> dict[str, Any]:
    """Return the package's provider info.

    Where the package cannot work, that is its name and description alone: Airflow 2.10 imports the
    class of every extra link, and logs a traceback when that fails.

    It has only keys that some supported Airflow acts on; every Airflow ignores the others. Airflow
    2 shows an extra link only when it is named here, since its webserver deserializes no other
    class.

    The plugin is not named here but has an entry point of its own: from here it would be loaded
    only with `[core] lazy_discover_providers` off, and from both places Airflow 3.3 would report
    the second one as an error.
    """
    named = {
        "package-name": "keras-remote-airflow",
        "name": "Keras Remote",
        "description": "Content-addressed training data on Cloud Storage.",
    }
    if missing_requirement():
        return named
    return named | {
        "extra-links": ["keras_remote_airflow.links.DatasetLink"],
        "task-decorators": [
            {"name": "local_data", "class-name": "keras_remote_airflow.decorators.local_data_task"}
        ],
        "triggers": [
            {
                "integration-name": "Keras Remote",
                "python-modules": ["keras_remote_airflow.triggers"],
            }
        ],
    }
