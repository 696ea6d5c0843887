"""What this package tells Airflow's provider manager (entry point `apache_airflow_provider`)."""

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the package's provider info.

    Only keys that some supported Airflow acts on; all take a provider that has more. Airflow 2
    shows an extra link only when it is named here, since its webserver deserializes no other class.

    The plugin is not named here but has an entry point of its own: from here it would be loaded
    only with `[core] lazy_discover_providers` off, and from both places Airflow 3.3 would call the
    second one an error.
    """
    return {
        "package-name": "keras-remote-airflow",
        "name": "Keras Remote",
        "description": "Content-addressed training data on Cloud Storage.",
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
