"""Check what a training image gets: this package with its base dependencies, without Airflow.

    .venv-light/bin/python scripts/check_light_install.py

Run by `make test-light`, in an environment that holds the wheel and what it requires. The bounds
are promises of the README. Nothing but that environment is needed, so that nothing but it counts.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MAX_DISTRIBUTIONS = 32
MAX_BYTES = 45_000_000
INSTALLERS = {"pip", "setuptools", "uv", "wheel"}  # not counted: what may have put it there

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def check_size() -> str:
    """Return how many distributions there are and what they weigh, without bytecode."""
    found = [
        each
        for each in importlib.metadata.distributions(path=[str(SITE_PACKAGES)])
        if each.name not in INSTALLERS
    ]
    size = sum(
        path.stat().st_size
        for path in SITE_PACKAGES.rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and path.relative_to(SITE_PACKAGES).parts[0].split("-")[0] not in INSTALLERS
    )
    said = f"{len(found)} distributions, {size / 1e6:.1f} MB"
    assert len(found) <= MAX_DISTRIBUTIONS, f"{said}; at most {MAX_DISTRIBUTIONS} are promised"
    assert size <= MAX_BYTES, f"{said}; at most {MAX_BYTES / 1e6:.0f} MB are promised"
    return said


def check_what_is_imported() -> None:
    """The code under test is what the wheel installed, and there is no Airflow."""
    import keras_remote_airflow

    where = Path(keras_remote_airflow.__file__)
    assert where.is_relative_to(SITE_PACKAGES), f"{where} is not in {SITE_PACKAGES}"
    assert importlib.util.find_spec("airflow") is None, "Airflow is installed"


def check_round_trip(folder: Path) -> None:
    """Upload to a local server and get it back: by function, by module and by command."""
    from keras_remote_airflow import make_data_ref, materialize, upload_data
    from keras_remote_airflow.testing import StorageServer

    data = folder / "data"
    (data / "sub").mkdir(parents=True)
    (data / "train.csv").write_text("t")
    (data / "sub" / "eval.csv").write_text("e")
    with StorageServer(buckets=["bucket"]) as server:
        os.environ.update(server.env())
        ref = make_data_ref(upload_data("bucket", str(data)), is_dir=True)
        materialize(ref, str(folder / "by function"))
        variable = os.environ | {"KERAS_REMOTE_DATA_REF": json.dumps(ref)}
        command = Path(sys.executable).parent / "keras-remote-data"
        for name, start in {
            "by module": [sys.executable, "-m", "keras_remote_airflow"],
            "by command": [str(command)],
        }.items():
            subprocess.run([*start, "get", str(folder / name)], env=variable, check=True)
    for name in "by function", "by module", "by command":
        assert (folder / name / "train.csv").read_text() == "t"
        assert (folder / name / "sub" / "eval.csv").read_text() == "e"


def check_what_operators_say() -> str:
    """Return the last line of what importing the operators ends with."""
    done = subprocess.run(
        [sys.executable, "-c", "import keras_remote_airflow.operators"],
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode, "the operators can be imported without Airflow"
    assert last.startswith("ImportError: "), done.stderr
    assert "keras-remote-airflow[airflow]" in last, last
    return last


def main() -> None:
    print(f"light install: {check_size()}")  # before anything is imported, and compiled
    check_what_is_imported()
    with tempfile.TemporaryDirectory() as folder:
        check_round_trip(Path(folder))
    print(f"uploaded and got back; the operators say: {check_what_operators_say()}")


if __name__ == "__main__":
    main()
