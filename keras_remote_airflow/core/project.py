"""Which Google Cloud project to use: the one place that decides."""

import os

_VARIABLES = ("KERAS_REMOTE_PROJECT", "GOOGLE_CLOUD_PROJECT")


def get_default_project() -> str | None:
    """Return the project id named by the environment, or None.

    Reads `KERAS_REMOTE_PROJECT`, then `GOOGLE_CLOUD_PROJECT`; an empty variable counts as unset.
    """
    return resolve_project()


def resolve_project(*candidates: str | None) -> str | None:
    """Return the first non-empty of `candidates`, else the environment's project, else None."""
    named = (*candidates, *(os.environ.get(variable) for variable in _VARIABLES))
    return next((project for project in named if project), None)
