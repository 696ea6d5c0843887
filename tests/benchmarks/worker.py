"""One measurement, in a process of its own: `python worker.py JOB`, JOB being JSON.

Imports, clients and connections' pools are made first and count for nothing. Then one action runs
under a clock, and a line of JSON on standard output tells

    seconds     wall clock
    cpu         CPU seconds of this process and its children
    peak        bytes by which resident memory rose at most, over the interpreter with its imports
    result      what the action returned

Everything else that a library prints goes to standard error. Linux only: /proc tells the memory.
"""

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from contenders import CONTENDERS, Job


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.loads(sys.argv[1]))
    action = CONTENDERS[job.contender](job)[job.action]
    json.dump(_measured(action), answer)
    answer.close()
    # Not the business of this process: threads and event loops that a library left running.
    os._exit(0)


def _measured(action: Callable[[], Any]) -> dict[str, Any]:
    gc.collect()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak that the imports reached
    resident = _memory("VmRSS")
    cpu, children = _cpu()
    started = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - started
    cpu_after, children_after = _cpu()
    peak = _memory("VmHWM") - resident
    if children_after > children:  # the largest child; it shares pages, so this is an upper bound
        peak += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "cpu": cpu_after - cpu + children_after - children,
        "peak": max(peak, 0),
        "result": result,
    }


def _cpu() -> tuple[float, float]:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def _memory(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    main()
