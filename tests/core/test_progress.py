"""What long work tells: a line now and then, or a bar at a terminal."""

import importlib.util
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import threading

import pytest

from keras_remote_airflow import make_data_ref, materialize
from keras_remote_airflow.core import progress as module
from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.datasets.materialize import download
from keras_remote_airflow.core.datasets.remote import RemoteData
from keras_remote_airflow.core.datasets.upload import publish, upload
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.layout import KERAS_REMOTE, CacheKey
from keras_remote_airflow.core.progress import Progress
from keras_remote_airflow.core.refs import DataRef

from .memory_store import MemoryStore

LOG = logging.getLogger(__name__)
MB = 1_000_000


class Clock:
    """Stands in for the time module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def lines(caplog):
    """`lines()` returns the lines of progress so far."""
    caplog.set_level(logging.INFO)
    return lambda: [r.message for r in caplog.records if "/s" in r.message]


def test_line_comes_every_30_seconds_and_tells_files_bytes_and_rate(clock, lines):
    progress = Progress(LOG, "Hashing here")
    for _ in range(100):
        clock.now += 1
        progress.add(2, 3 * MB)
    assert lines() == [
        "Hashing here: 60 files, 90.0 MB, 3.0 MB/s",
        "Hashing here: 120 files, 180.0 MB, 3.0 MB/s",
        "Hashing here: 180 files, 270.0 MB, 3.0 MB/s",
    ]


def test_line_of_a_total_tells_the_time_left(clock, lines):
    progress = Progress(LOG, "Uploading")
    progress.expect(10, 100 * MB)
    clock.now += 40
    progress.add(4, 20 * MB)
    assert lines() == ["Uploading: 4/10 files, 20.0 MB of 100.0 MB, 500.0 kB/s, about 160 s left"]


def test_bytes_of_a_file_under_way_count_and_are_told(clock, lines):
    progress = Progress(LOG, "Uploading")
    progress.expect(1, 100 * MB)
    clock.now += 50
    progress.move(25 * MB)
    assert lines() == ["Uploading: 0/1 files, 25.0 MB of 100.0 MB, 500.0 kB/s, about 150 s left"]
    assert (progress.files, progress.bytes) == (0, 0)


def test_bytes_that_are_sent_again_count_once(clock, lines):
    progress = Progress(LOG, "Uploading")
    progress.move(60 * MB)
    progress.move(-20 * MB)
    clock.now += 100
    progress.move(10 * MB)
    progress.move(-50 * MB)
    clock.now += 100
    progress.add(1, 80 * MB)
    assert lines() == [
        "Uploading: 0 files, 50.0 MB, 500.0 kB/s",
        "Uploading: 1 files, 80.0 MB, 400.0 kB/s",
    ]


def test_clock_starts_with_the_work(clock, lines):
    progress = Progress(LOG, "Uploading")
    clock.now += 3600
    with progress:
        progress.add(1, MB)
        assert lines() == []
        clock.now += 31
        progress.add(1, 30 * MB)
        assert progress.seconds == 31
    assert lines() == ["Uploading: 2 files, 31.0 MB, 1.0 MB/s"]


def test_what_somebody_else_does_is_not_waited_for(clock, lines):
    progress = Progress(LOG, "Uploading")
    progress.expect(10, 100 * MB)
    progress.skip(5, 40 * MB)
    clock.now += 30
    progress.add(1, 30 * MB)
    assert lines() == ["Uploading: 1/5 files, 30.0 MB of 60.0 MB, 1.0 MB/s, about 30 s left"]


class SlowStore(MemoryStore):
    """Takes 31 s for each file."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def upload(self, uploads, done, moved):
        def late(upload, was_sent):
            self._clock.now += 31
            done(upload, was_sent)

        super().upload(uploads, late, moved)


def test_after_a_resume_the_time_left_is_that_of_what_is_missing(tree, clock, lines):
    root = tree({str(number): "x" * 3100 for number in range(4)})
    snapshot = take_snapshot(str(root))
    key = CacheKey("memory-bucket", "default", snapshot.content_hash, KERAS_REMOTE)
    store = SlowStore(clock)
    for name in ("0", "1"):
        store.replace(key.object_name(name), b"x" * 3100)
    publish(store, key, snapshot, Progress(LOG, "Uploading"))
    assert lines() == [
        "Uploading: 1/2 files, 3.1 kB of 6.2 kB, 100 B/s, about 31 s left",
        "Uploading: 2/2 files, 6.2 kB of 6.2 kB, 100 B/s, about 0 s left",
    ]


@pytest.fixture
def told(monkeypatch, lines):
    """Every state is a line."""
    monkeypatch.setattr(module, "_LINE_INTERVAL", 0.0)
    return lines


def amounts(lines, activity):
    return [
        re.match(r"[^:]+: (\S+) files, (\S+ \S+ of \S+ \S+),", line.replace("gs:", ""))[2]
        for line in lines
        if line.startswith(activity)
    ]


def test_one_large_file_is_told_of_on_its_way_up_and_down(tree, gcs_bucket, told, tmp_path):
    root = tree({"large.bin": bytes(20 << 20)})
    result = upload(gcs_bucket, root)
    assert (result.uploaded_files, result.uploaded_bytes) == (1, 20 << 20)
    materialize(make_data_ref(result.gcs_uri, True), str(tmp_path / "copy"))
    for activity in ("Uploading", "Downloading"):
        steps = amounts(told(), activity)
        assert len(steps) > 10
        assert steps[-1] == "21.0 MB of 21.0 MB"
        assert len(set(steps)) > 10


def test_hashing_has_a_total_of_one_file_and_of_what_was_downloaded(
    tree, gcs_bucket, told, tmp_path
):
    root = tree({"large.bin": bytes(20 << 20)})
    take_snapshot(str(root / "large.bin"))
    assert amounts(told(), "Hashing")[-1] == "21.0 MB of 21.0 MB"
    ref = make_data_ref(upload(gcs_bucket, root).gcs_uri, True)
    materialize(ref, str(tmp_path / "copy"))
    assert amounts(told(), f"Hashing {tmp_path}/.keras-remote")[-1] == "21.0 MB of 21.0 MB"


def test_download_of_more_than_one_batch_has_the_totals_of_the_receipt(
    tree, gcs_bucket, told, tmp_path
):
    uri = upload(gcs_bucket, tree(dict.fromkeys("abcde", "1234"))).gcs_uri
    (tmp_path / "copy").mkdir()
    with open_bucket(gcs_bucket) as store:
        download(RemoteData(store, DataRef(uri, True)), str(tmp_path / "copy"), batch_objects=2)
    steps = amounts(told(), "Downloading")
    assert steps == [f"{size} B of 20 B" for size in (4, 8, 12, 16, 20)]


AT_A_TERMINAL = """
import logging, sys, time
from keras_remote_airflow.core import progress
progress._BAR_DELAY = progress._LINE_INTERVAL = 0.0
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
if sys.argv[1] == "without":
    sys.modules["tqdm"] = None
with progress.Progress(logging.getLogger(), "Uploading to gs://bucket/name") as bar:
    bar.expect(2, 8_000_000)
    for _ in range(4):
        time.sleep(0.11)
        bar.move(1_000_000)
    bar.move(-4_000_000)
    bar.add(2, 8_000_000)
"""


def at_a_terminal(tqdm: str, **env: str) -> str:
    """Return what a process says on its stderr, which is a terminal."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (25, 100))
    said = []

    def listen() -> None:
        try:
            while text := os.read(ours, 4096):
                said.append(text)
        except OSError:  # Linux says so when the last process has closed the terminal
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        done = subprocess.run(
            [sys.executable, "-c", AT_A_TERMINAL, tqdm],
            env=os.environ | env,
            stderr=its,
            timeout=60,
        )
    finally:
        os.close(its)
        listener.join(10)
        os.close(ours)
    text = b"".join(said).decode()
    assert done.returncode == 0, text
    return text


@pytest.mark.skipif(not importlib.util.find_spec("tqdm"), reason="tqdm is optional")
def test_terminal_shows_a_bar_and_no_lines():
    text = at_a_terminal("with")
    assert "INFO" not in text
    assert re.search(r"Uploading: +\d+%.*\d\.00M/8\.00M .*B/s, 0/2 files\]", text)
    assert re.search(r"Uploading: 100%.*8\.00M/8\.00M .*B/s, 2/2 files\]", text)


@pytest.mark.parametrize(
    ("tqdm", "env"),
    [("without", {}), ("with", {"AIRFLOW_CTX_DAG_ID": "dag"})],
    ids=["without tqdm", "in an Airflow task"],
)
def test_terminal_shows_lines_where_there_is_no_bar(tqdm, env):
    text = at_a_terminal(tqdm, **env)
    assert "Uploading to gs://bucket/name: 0/2 files, 1.0 MB of 8.0 MB" in text
    assert "%" not in text


def test_no_terminal_shows_lines():
    done = subprocess.run(
        [sys.executable, "-c", AT_A_TERMINAL, "with"], capture_output=True, text=True, timeout=60
    )
    assert "2/2 files, 8.0 MB of 8.0 MB" in done.stderr
    assert "%" not in done.stderr
