"""The DAG train_digits, run by Airflow, up to a trained model and its report."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from keras_remote_airflow import Data

# Looked for, not imported: that takes seconds, and Keras wants to know its backend first.
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ["keras", "jax", "sklearn", "PIL"])),
    reason="the extra `demo` brings what the examples train with",
)

DAG_FILE = Path(__file__).parents[2] / "dags" / "train_digits.py"

# Of the 1,797 images as the DAG writes them, on every machine and with every version of Pillow.
DIGITS_HASH = "801192f6e4ea1cbe08e94315deb519b15e815f8e479159f03e058c8dfbb5ef04"
DIGITS_BYTES = 251_580


@pytest.fixture
def train(run_dag, gcs_server, gcs_bucket, tmp_path):
    """Run the DAG on `tmp_path`, and return its run and its report's rows."""

    def run():
        before = set(tmp_path.glob("reports/*.md"))
        finished = run_dag(
            DAG_FILE,
            "train_digits",
            conf={"data_dir": str(tmp_path)},
            KERAS_HOME=str(tmp_path / "keras"),  # else it makes ~/.keras
            AIRFLOW_VAR_KERAS_REMOTE_BUCKET=gcs_bucket,
            STORAGE_EMULATOR_HOST=gcs_server.url,
        )
        assert set(finished.states.values()) == {"success"}, finished.log
        (page,) = set(tmp_path.glob("reports/*.md")) - before
        return finished, dict(re.findall(r"^\| (.+) \| (.+) \|$", page.read_text(), re.M))

    return run


def test_digits_are_uploaded_once_and_the_model_knows_its_data(
    train, gcs_server, gcs_bucket, tmp_path
):
    run, report = train()

    assert float(report["accuracy"]) >= 0.95
    assert report["content hash"] == Data(str(tmp_path / "digits")).content_hash() == DIGITS_HASH
    assert report["data"] == f"gs://{gcs_bucket}/default/data-cache/{DIGITS_HASH}"
    assert report["cache"] == "miss"
    assert (report["files"], report["files uploaded"]) == ("1797", "1797")
    assert report["files reused"] == "0"
    assert report["bytes uploaded"] == str(DIGITS_BYTES)
    # The images and the marker.
    assert len(gcs_server.objects(gcs_bucket)) == 1797 + 1
    assert run.xcoms["upload"]["return_value"] == run.xcoms["wait"]["return_value"]

    _, again = train()

    assert float(again["accuracy"]) >= 0.95
    assert again["content hash"] == DIGITS_HASH
    assert again["cache"] == "hit"
    assert (again["files uploaded"], again["bytes uploaded"]) == ("0", "0")
    assert (again["files reused"], again["bytes reused"]) == ("1797", str(DIGITS_BYTES))
    assert len(gcs_server.objects(gcs_bucket)) == 1797 + 1


def test_half_written_digits_are_not_taken_for_whole_ones(airflow_home, tmp_path):
    (tmp_path / "digits" / "0").mkdir(parents=True)
    (tmp_path / "digits" / "0" / "0000.png").write_bytes(b"the writer died here")

    program = "import runpy, sys; dag_file, data_dir = sys.argv[1:]; "
    program += "runpy.run_path(dag_file)['write_digits'].function(data_dir)"
    subprocess.run(
        [sys.executable, "-c", program, DAG_FILE, tmp_path], env=airflow_home, check=True
    )

    assert Data(str(tmp_path / "digits")).content_hash() == DIGITS_HASH
