"""The fixtures that users' own DAG tests get, and the command line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from keras_remote_airflow.testing import StorageServer, environment

pytest_plugins = ["pytester"]

USERS_TESTS = """
import json, os, urllib.request
import pytest
from keras_remote_airflow.testing import environment

def get(path):
    with urllib.request.urlopen(os.environ["STORAGE_EMULATOR_HOST"] + path) as answer:
        return json.load(answer)

def test_bucket(gcs_bucket):
    assert get(f"/storage/v1/b/{gcs_bucket}")["name"] == gcs_bucket
    assert "items" not in get(f"/storage/v1/b/{gcs_bucket}/o")
    expected = environment(os.environ["STORAGE_EMULATOR_HOST"])
    assert {name: os.environ[name] for name in expected} == expected

def test_server(gcs_server, gcs_bucket):
    gcs_server.put(gcs_bucket, "x", b"data")
    assert get(f"/storage/v1/b/{gcs_bucket}/o/x")["size"] == "4"
"""


def run_users_tests(pytester: pytest.Pytester) -> Any:
    pytester.makepyfile(USERS_TESTS)
    return pytester.runpytest_subprocess("-rs")


@pytest.mark.slow
def test_the_fixtures_offer_a_server_of_their_own(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    run_users_tests(pytester).assert_outcomes(passed=2)


@pytest.mark.slow
def test_the_fixtures_use_a_server_that_is_set_already(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StorageServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        result = run_users_tests(pytester)
        result.assert_outcomes(passed=1, skipped=1)
        result.stdout.fnmatch_lines(["*needs fault hooks of the local server*"])
        assert any(r.path == "/storage/v1/b" and r.method == "POST" for r in server.requests)


def test_the_plugin_is_light() -> None:
    # pytest loads it in every run once the package is installed.
    code = (
        "import sys, pytest; before = set(sys.modules); "
        "import keras_remote_airflow.testing.plugin; print(*set(sys.modules) - before)"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"airflow", "google", "asyncio", "aiohttp", "google_crc32c"} & set(loaded)


def test_the_server_needs_no_google_client_and_no_airflow() -> None:
    code = "import sys; from keras_remote_airflow.testing import StorageServer; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"airflow", "google.cloud.storage", "requests"} & set(loaded)


def test_the_command_starts_a_server_and_prints_how_to_use_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keras_remote_airflow.testing", "--port", "0"]
    command += ["--bucket", "demo", "--bucket", "two", "--dir", str(tmp_path), "--latency-ms", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip().removeprefix("export STORAGE_EMULATOR_HOST=")
            for name, value in list(environment(url).items())[1:]:
                assert process.stdout.readline() == f"export {name}={shlex.quote(value)}\n"
            with urllib.request.urlopen(f"{url}/storage/v1/b") as answer:
                assert [item["name"] for item in json.load(answer)["items"]] == ["demo", "two"]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert sorted(os.listdir(tmp_path)) == ["demo", "two"]


def test_the_documentation_shows_what_is_set() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "testing-your-dags.md").read_text("utf-8")
    for name, value in environment("http://127.0.0.1:9023").items():
        assert f"export {name}={shlex.quote(value)}\n" in page


@pytest.mark.parametrize("options", [["--bucket", "NOT A BUCKET"], ["--host", "256.0.0.1"]])
def test_the_command_says_what_is_wrong(options: list[str]) -> None:
    command = [sys.executable, "-m", "keras_remote_airflow.testing", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("cannot start: ")


def test_the_command_says_what_to_do_about_a_port_in_use() -> None:
    with StorageServer() as first:
        command = [sys.executable, "-m", "keras_remote_airflow.testing", "--port", str(first.port)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "choose another --port, or 0" in done.stderr


def test_a_port_in_use_is_an_error_not_a_hang() -> None:
    with StorageServer() as first, pytest.raises(OSError):
        StorageServer(port=first.port).start()
