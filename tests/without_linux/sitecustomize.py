"""Takes away from Python what only Linux has, so that core's tests show what macOS would do.

    PYTHONPATH=tests/without_linux python -m pytest tests/core

Python imports a module of this name when it starts, in the processes that tests start, too.
"""

import fcntl
import os
import socket
import time

ONLY_ON_LINUX = {
    os: (
        "O_DIRECT",
        "O_NOATIME",
        "O_PATH",
        "O_TMPFILE",
        "copy_file_range",
        "eventfd",
        "getrandom",
        "getxattr",
        "memfd_create",
        "pidfd_open",
        "pipe2",
        "posix_fadvise",
        "posix_fallocate",
        "process_cpu_count",  # asks sched_getaffinity
        "sched_getaffinity",
        "sched_setaffinity",
        "setxattr",
        "splice",
    ),
    fcntl: ("flock",),  # macOS has it; some systems do not
    socket: ("TCP_CORK", "TCP_QUICKACK", "TCP_USER_TIMEOUT"),
    time: ("CLOCK_BOOTTIME",),
}

for module, names in ONLY_ON_LINUX.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
