"""The task of train_digits that writes the images. Whole runs: tests/airflow/test_standalone.py."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from keras_remote_airflow import Data

DAG_FILE = Path(__file__).parents[2] / "dags" / "train_digits.py"
DIGITS_HASH = "801192f6e4ea1cbe08e94315deb519b15e815f8e479159f03e058c8dfbb5ef04"


@pytest.mark.skipif(
    not all(map(find_spec, ["sklearn", "PIL"])),
    reason="the extra `demo` brings what the examples train with",
)
def test_half_written_digits_are_not_taken_for_whole_ones(airflow_home, tmp_path):
    (tmp_path / "digits" / "0").mkdir(parents=True)
    (tmp_path / "digits" / "0" / "0000.png").write_bytes(b"the writer died here")

    program = "import runpy, sys; dag_file, data_dir = sys.argv[1:]; "
    program += "runpy.run_path(dag_file)['write_digits'].function(data_dir)"
    subprocess.run(
        [sys.executable, "-c", program, DAG_FILE, tmp_path], env=airflow_home, check=True
    )

    assert Data(str(tmp_path / "digits")).content_hash() == DIGITS_HASH
