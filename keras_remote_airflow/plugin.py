"""The package in Airflow's list of plugins (entry point `airflow.plugins`)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_remote_airflow._compat import AirflowPlugin
else:
    try:
        from keras_remote_airflow._compat import AirflowPlugin
    except ImportError:
        # The package cannot work with what is installed. The import of an operator says why; here
        # Airflow would log a traceback at every start. It passes over a class that is no plugin.
        AirflowPlugin = object


class KerasRemotePlugin(AirflowPlugin):
    """Shows in `airflow plugins`, and under Admin, Plugins, that the package is installed.

    It adds nothing: operators, the decorator, the link and the trigger work without it, and what
    Airflow has to know about them is in `provider_info`.
    """

    name = "keras_remote"
