"""Raises a one-line ImportError on Windows. Modules that need POSIX import it."""

import os

if os.name != "posix":
    raise ImportError(
        "keras_remote_airflow reads, hashes and transfers files with POSIX calls, which Windows "
        "lacks: run it in WSL (https://learn.microsoft.com/windows/wsl/install)"
    )
