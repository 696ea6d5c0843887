"""Run the example DAG train_digits three times through Airflow, against a local storage server.

The first run must upload, the second must find everything there, and the third, after one image
was changed, must upload under a new hash. Anything else ends the demo with an error. Everything it
writes lies in one folder; the server and Airflow end with it.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from PIL import Image

from keras_remote_airflow.testing import StorageServer

REPOSITORY = Path(__file__).resolve().parent.parent
BUCKET = "demo"
LOG_TAIL_LINES = 40

# Airflow's own command line, run once per line of standard input. One process for all commands,
# because importing Airflow, Keras and JAX takes longer than everything else here.
AIRFLOW = """
import json, sys
from airflow.__main__ import main
for line in sys.stdin:
    sys.argv = ["airflow", *json.loads(line)]
    main()
    print("[demo] done", flush=True)
"""


class DemoError(Exception):
    """The demo did not go as promised."""


@dataclass(frozen=True)
class Run:
    """What one run's report says, and how long the run took."""

    title: str
    seconds: float
    report: dict[str, str]

    @property
    def content_hash(self) -> str:
        return self.report["content hash"]

    def count(self, row: str) -> int:
        return int(self.report[row])


class Airflow:
    """A running Airflow process that takes commands, and writes all it says to a log."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-c", AIRFLOW],
            env=environment,
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that close() ends it with all its children
        )

    def run(self, *command: str) -> None:
        """Run one command to its end, printing a line for every task that ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it died; what it said last is read below
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        task, started = "", 0.0
        for line in self._process.stdout:
            if line == "[demo] done\n":
                return
            self._log.write(line)
            self._log.flush()
            if match := re.search(r"\[DAG TEST\] (starting|end task) task_id=(\S+)", line):
                if match[1] == "starting":
                    task, started = match[2], time.monotonic()
                    print(f"  {task:<14}", end="", flush=True)
                else:
                    print(f"{time.monotonic() - started:5.1f} s", flush=True)
                    task = ""
        if task:
            print("failed")
        raise DemoError(f"`airflow {' '.join(command)}` failed")

    def close(self) -> None:
        """End the process and its children, whatever state they are in."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(timeout=5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._process.wait()
        self._log.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=REPOSITORY / ".demo", help="working folder")
    folder = parser.parse_args().dir.resolve()
    signal.signal(signal.SIGTERM, _interrupt)

    started = time.monotonic()
    data, log = folder / "data", folder / "airflow.log"
    shutil.rmtree(data, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    print(f"Everything Airflow says goes to {log}")
    try:
        with (
            StorageServer(buckets=[BUCKET]) as server,
            _airflow(folder, server, log) as airflow,
        ):
            print("Preparing Airflow's database ...", flush=True)
            airflow.run("db", "migrate")
            first = _train("nothing uploaded yet", airflow, data)
            second = _train("nothing changed", airflow, data)
            image = _change_one_image(data / "digits")
            third = _train(f"{image} changed", airflow, data)
        _print_table([first, second, third])
        _check(first, second, third)
    except DemoError as error:
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        print("\n".join(["", *lines[-LOG_TAIL_LINES:], "", f"{error}; the whole log: {log}"]))
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    print(f"\nAll as promised, in {time.monotonic() - started:.0f} s. Reports: {data / 'reports'}")
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _airflow(folder: Path, server: StorageServer, log: Path) -> Iterator[Airflow]:
    # Nothing of the caller's own Airflow or cloud account takes part.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AIRFLOW", "GOOGLE_", "KERAS_", "CLOUDSDK_"))
    }
    environment |= server.env() | {
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",
        "AIRFLOW_VAR_KERAS_REMOTE_BUCKET": BUCKET,
        "AIRFLOW_VAR_KERAS_REMOTE_DATA_DIR": str(folder / "data"),
        "TMPDIR": str(folder / "tmp"),  # training data is kept there between tasks
        "KERAS_HOME": str(folder / "keras"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    airflow = Airflow(environment, log)
    try:
        yield airflow
    finally:
        airflow.close()


def _train(title: str, airflow: Airflow, data: Path) -> Run:
    print(f"\ntrain_digits: {title}", flush=True)
    before = set(data.glob("reports/*.md"))
    started = time.monotonic()
    airflow.run("dags", "test", "train_digits")
    seconds = time.monotonic() - started
    pages = set(data.glob("reports/*.md")) - before
    if len(pages) != 1:
        raise DemoError(f"expected one new report in {data / 'reports'}, found {len(pages)}")
    rows = re.findall(r"^\| (.+) \| (.+) \|$", pages.pop().read_text(encoding="utf-8"), re.M)
    return Run(title, seconds, dict(rows))


def _change_one_image(digits: Path) -> str:
    """Paint one pixel white; return the image's name."""
    path = min(digits.rglob("*.png"))
    with Image.open(path) as image:
        image.putpixel((0, 0), 255)
        image.save(path)
    return path.relative_to(digits).as_posix()


def _print_table(runs: list[Run]) -> None:
    header = ("run", "cache", "content hash", "files", "uploaded", "bytes", "accuracy", "seconds")
    rows = [
        (
            run.title,
            run.report["cache"],
            run.content_hash[:12],
            f"{run.count('files'):,}",
            f"{run.count('files uploaded'):,}",
            f"{run.count('bytes uploaded'):,}",
            run.report["accuracy"],
            f"{run.seconds:.1f}",
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print()
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if number < 3 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _check(first: Run, second: Run, third: Run) -> None:
    promises = {
        "the first run misses": first.report["cache"] == "miss",
        "the first run uploads every file": first.count("files uploaded") == first.count("files"),
        "the second run hits": second.report["cache"] == "hit",
        "the second run uploads 0 bytes": second.count("bytes uploaded") == 0,
        "the second run trains on the same bytes": second.content_hash == first.content_hash,
        "the third run misses": third.report["cache"] == "miss",
        "the third run has a new hash": third.content_hash != first.content_hash,
        "the third run uploads every file": third.count("files uploaded") == third.count("files"),
        "accuracy is at least 0.95": all(
            float(run.report["accuracy"]) >= 0.95 for run in (first, second, third)
        ),
    }
    broken = [promise for promise, kept in promises.items() if not kept]
    if broken:
        raise DemoError("not true: " + "; ".join(broken))


if __name__ == "__main__":
    sys.exit(main())
