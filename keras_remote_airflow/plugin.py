"""The package in Airflow's list of plugins (entry point `airflow.plugins`)."""

from keras_remote_airflow._compat import AirflowPlugin


class KerasRemotePlugin(AirflowPlugin):
    """Shows in `airflow plugins`, and under Admin, Plugins, that the package is installed.

    It adds nothing: operators, the decorator, the link and the trigger work without it, and what
    Airflow has to know of them is in `provider_info`.
    """

    name = "keras_remote"
