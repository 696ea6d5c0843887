"""`python -m keras_remote_airflow`, started as a container starts it."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from keras_remote_airflow import Data, make_data_ref, upload_data
from keras_remote_airflow.__main__ import main
from keras_remote_airflow.core.refs import REF_VARIABLE

from .conftest import on_disk

# runpy is what `python -m` does; before it, every import of Airflow is made to fail.
WITHOUT_AIRFLOW = """
import runpy, sys

class NoAirflow:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "airflow":
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, NoAirflow())
runpy.run_module("keras_remote_airflow", run_name="__main__", alter_sys=True)
"""
FILES = {"train.csv": b"t", "sub/éval.csv": b"e"}


def get_in_a_process(*args, program=("-m", "keras_remote_airflow"), **env):
    return subprocess.run(
        [sys.executable, *program, "get", *args],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def get(monkeypatch, capsys):
    """`get(*args, stdin=None, ref=None)` runs the command in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv(REF_VARIABLE, raising=False)

    def run(*args, stdin=None, ref=None):
        monkeypatch.setattr(sys, "stdin", stdin or io.StringIO())
        if ref is not None:
            monkeypatch.setenv(REF_VARIABLE, ref)
        capsys.readouterr()
        try:
            code = main(["get", *map(str, args)])
        except SystemExit as ended:  # argparse ends so
            code = int(ended.code)
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def ref(gcs_bucket, tree):
    return make_data_ref(upload_data(gcs_bucket, Data(str(tree(FILES)))), True)


@pytest.mark.parametrize(
    "way", ["argument", "stdin", "variable", "repr", "uri", "option between", "option first"]
)
def test_prints_the_path_and_nothing_else(get, ref, tmp_path, way):
    dest, text = tmp_path / "dest", json.dumps(ref)
    done = {
        "argument": lambda: get(text, dest),
        "stdin": lambda: get("-", dest, stdin=io.StringIO(text + "\n")),
        "variable": lambda: get(dest, ref=text),
        "repr": lambda: get(repr(ref), dest),
        "uri": lambda: get(ref["gcs_uri"], dest),
        "option between": lambda: get(ref["gcs_uri"], "--dir", dest),
        "option first": lambda: get("--dir", ref["gcs_uri"], dest),
    }[way]()
    assert (done.returncode, done.stdout) == (0, f"{dest}\n"), done.stderr
    assert on_disk(dest) == FILES


def test_process_prints_the_path_alone_and_logs_to_stderr(ref, tmp_path):
    # A locale without é: names are bytes.
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    dest = tmp_path / "dést"
    done = get_in_a_process(dest, **{REF_VARIABLE: json.dumps(ref)}, **locale)
    assert (done.returncode, done.stdout) == (0, f"{dest}\n"), done.stderr
    assert ref["gcs_uri"] in done.stderr
    assert on_disk(dest) == FILES


def test_runs_where_airflow_cannot_be_imported(ref, tmp_path):
    done = get_in_a_process(json.dumps(ref), tmp_path / "dest", program=("-c", WITHOUT_AIRFLOW))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'dest'}\n"), done.stderr


def test_a_file_lands_in_dest_under_its_own_name(get, gcs_bucket, tree, tmp_path):
    uri = upload_data(gcs_bucket, Data(str(tree(FILES) / "train.csv")))
    done = get(uri, "--file", tmp_path / "dest")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'dest' / 'train.csv'}\n")


def test_another_dataset_is_replaced_only_if_that_is_asked_for(
    get, ref, gcs_bucket, tree, tmp_path
):
    other = upload_data(gcs_bucket, Data(str(tree({"a": b"1"}, "other"))))
    dest = tmp_path / "dest"
    assert get(json.dumps(ref), dest, "--replace").returncode == 0
    done = get(other, dest)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--replace" in done.stderr
    assert "replace=True" not in done.stderr
    assert on_disk(dest) == FILES
    assert get(other, dest, "--replace").stdout == f"{dest}\n"
    assert on_disk(dest) == {"a": b"1"}


def test_without_dest_the_ref_decides(get, ref, tmp_path):
    done = get(json.dumps(ref | {"mount_path": str(tmp_path / "mount")}))
    assert done.stdout == f"{tmp_path / 'mount'}\n"


@pytest.mark.parametrize("spelling", ["{}/dest", "./dest", "../{name}/dest", "~/dest"])
def test_one_argument_alone_that_is_spelled_as_a_path_is_the_destination(
    get, ref, tmp_path, monkeypatch, spelling
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = get(spelling.format(tmp_path, name=tmp_path.name), ref=json.dumps(ref))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'dest'}\n"), done.stderr


def test_user_project_is_billed_for_every_request(get, tree, gcs_server, tmp_path):
    gcs_server.create_bucket("requester-pays", requester_pays=True)
    uri = upload_data("requester-pays", str(tree(FILES)), user_project="payer")
    gcs_server.clear_requests()
    done = get(uri, "--dir", tmp_path / "dest", "--user-project", "payer")
    assert done.returncode == 0, done.stderr
    assert {request.query.get("userProject") for request in gcs_server.requests} == {"payer"}


def test_without_arguments_the_ref_of_the_environment_decides(get, ref, tmp_path):
    done = get(ref=json.dumps(ref | {"mount_path": str(tmp_path / "mount")}))
    assert done.stdout == f"{tmp_path / 'mount'}\n", done.stderr


def test_the_environment_is_not_asked_when_a_ref_is_passed(get, ref, tmp_path):
    done = get(json.dumps(ref), tmp_path / "dest", ref="not a ref")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        ((), "KERAS_REMOTE_DATA_REF"),
        (("-",), "KERAS_REMOTE_DATA_REF"),
        (("{}",), "{}"),
        (("no\nJSON",), r"'no\nJSON'"),
        (("gs://test-bucket/raw",), "gs://test-bucket/raw"),
        (("gs://test-bucket/raw",), "--dir"),
        (("gs://UPPER/raw/",), "'UPPER'"),
        (('{"__data_ref__": true}', "--dir"), "--dir"),
        (('{"__data_ref__": true, "gcs_uri": "gs://abc"}',), "is_dir"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(get, args, fact, gcs_server):
    done = get(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert fact in done.stderr
    assert gcs_server.requests == []


@pytest.mark.parametrize(
    "args",
    [
        ("gs://test-bucket/raw", "--dir", "--file"),
        ("gs://test-bucket/raw/", "/a", "/b"),
        ("gs://test-bucket/raw/", "--dir", "/a", "/b"),
        ("gs://test-bucket/raw/", "--no-such-option"),
        ("gs://test-bucket/raw/", "--user", "p"),
    ],
    ids=str,
)
def test_bad_options_are_exit_code_2_too(get, args, gcs_server):
    done = get(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: keras-remote-data" in done.stderr
    assert "Traceback" not in done.stderr
    assert gcs_server.requests == []


def test_one_argument_alone_that_is_not_spelled_as_a_path_is_no_destination(get, ref, gcs_server):
    done = get("dest", ref=json.dumps(ref))
    assert (done.returncode, done.stdout) == (2, "")
    assert "'dest'" in done.stderr


def test_sigterm_ends_it_with_the_exit_code_of_a_signal(get):
    class Input(io.StringIO):
        def read(self, size=-1, /):
            os.kill(os.getpid(), signal.SIGTERM)
            return ""

    assert get("-", stdin=Input()).returncode == 128 + signal.SIGTERM


def test_ctrl_c_is_one_line_and_the_exit_code_of_a_signal(get):
    class Input(io.StringIO):
        def read(self, size=-1, /):
            raise KeyboardInterrupt

    done = get("-", stdin=Input())
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
    assert done.stderr.count("\n") == 1


def test_wrong_bytes_are_exit_code_1(get, ref, gcs_server, tmp_path):
    gcs_server.put("test-bucket", ref["gcs_uri"].split("/", 3)[3] + "/train.csv", b"x")
    done = get(json.dumps(ref), tmp_path / "dest")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert ref["gcs_uri"] in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "dest").exists()


def test_no_credentials_are_exit_code_1(monkeypatch, tmp_path):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # otherwise it looks for a metadata server
    done = get_in_a_process("gs://test-bucket/raw/")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "credentials" in last
    assert "GOOGLE_APPLICATION_CREDENTIALS" in last
    assert "connection" not in last, "there is none"
    assert "Traceback" not in done.stderr


def test_word_that_is_no_dataset_may_be_meant_as_the_destination(get, ref):
    done = get("data2", ref=json.dumps(ref))
    assert done.returncode == 2
    assert "write ./data2" in done.stderr


def test_taken_destination_that_is_no_dataset_is_named_as_such(get, ref, tmp_path):
    dest = tmp_path / "dest"
    dest.mkdir()
    os.mkfifo(dest / "pipe")
    done = get(json.dumps(ref), dest)
    assert done.returncode == 2
    assert re.search(rf"destination is taken.*FIFO.*: {dest}\. Choose another", done.stderr)


def test_bucket_that_does_not_exist_is_named(get, ref, gcs_bucket, tmp_path):
    uri = ref["gcs_uri"].replace(gcs_bucket, "no-such-bucket")
    done = get(uri, tmp_path / "dest", "--dir")
    assert done.returncode == 1
    assert "bucket no-such-bucket does not exist" in done.stderr


def test_destination_inside_a_file_is_refused_before_anything_is_asked(
    get, ref, tmp_path, gcs_server
):
    (tmp_path / "file").write_bytes(b"")
    gcs_server.clear_requests()
    dest = tmp_path / "file" / "sub" / "dest"
    done = get(json.dumps(ref), dest)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert str(dest) in done.stderr
    assert ".partial" not in done.stderr
    assert gcs_server.requests == []
