"""What this package tells Airflow's provider manager (entry point `apache_airflow_provider`)."""

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the package's provider info.

    Only keys that the schemas of Airflow 2.11 and 3.3 both accept: an unknown one makes 2.11
    refuse the whole provider. Airflow 2 shows an extra link only when it is named here, since its
    webserver deserializes no other class.
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
