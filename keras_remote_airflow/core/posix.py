"""Imported by what needs POSIX, so that Windows says in one line what to do instead."""

import os

if os.name != "posix":
    raise ImportError(
        "keras_remote_airflow reads, hashes and transfers files with POSIX calls, which Windows "
        "lacks: run it in WSL (https://learn.microsoft.com/windows/wsl/install)"
    )
