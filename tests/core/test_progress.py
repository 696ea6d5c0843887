"""What long work tells: a log line now and then, or calls of the caller's function."""

import logging
import re
import threading

import pytest

from keras_remote_airflow import Data, make_data_ref, materialize, upload_data
from keras_remote_airflow.core import progress as module
from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.store import ignore_moved
from keras_remote_airflow.core.datasets.download import download
from keras_remote_airflow.core.datasets.remote import RemoteData
from keras_remote_airflow.core.datasets.upload import publish, upload
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.layout import KERAS_REMOTE, CacheKey
from keras_remote_airflow.core.progress import Progress, ProgressUpdate, format_bytes
from keras_remote_airflow.core.refs import DataRef
from keras_remote_airflow.testing import Fault

from .memory_store import MemoryStore

LOG = logging.getLogger(__name__)
MB = 1_000_000


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(caplog):
    """`lines()` returns the lines of progress so far."""
    caplog.set_level(logging.INFO)
    return lambda: [r.message for r in caplog.records if "/s" in r.message]


def test_line_comes_every_30_seconds_and_tells_files_bytes_and_rate(clock, lines):
    progress = Progress(LOG, "Hashing", "/data", clock=clock)
    for _ in range(100):
        clock.now += 1
        progress.add(2, 3 * MB)
    assert lines() == [
        "Hashing 60 files, 90.0 MB, 3.0 MB/s: /data",
        "Hashing 120 files, 180.0 MB, 3.0 MB/s: /data",
        "Hashing 180 files, 270.0 MB, 3.0 MB/s: /data",
    ]


def test_line_of_a_total_tells_the_time_left(clock, lines):
    progress = Progress(LOG, "Uploading", clock=clock)
    progress.expect(10, 100 * MB)
    clock.now += 40
    progress.add(4, 20 * MB)
    assert lines() == ["Uploading 4/10 files, 20.0 MB of 100.0 MB, 500.0 kB/s, about 160 s left"]


def test_bytes_of_an_unfinished_file_count_and_are_told(clock, lines):
    progress = Progress(LOG, "Uploading", clock=clock)
    progress.expect(1, 100 * MB)
    clock.now += 50
    progress.move(25 * MB)
    assert lines() == ["Uploading 0/1 file, 25.0 MB of 100.0 MB, 500.0 kB/s, about 150 s left"]
    assert (progress.files, progress.bytes) == (0, 0)


def test_bytes_that_are_sent_again_count_once(clock, lines):
    progress = Progress(LOG, "Uploading", clock=clock)
    progress.move(60 * MB)
    progress.move(-20 * MB)
    clock.now += 100
    progress.move(10 * MB)
    progress.move(-50 * MB)
    clock.now += 100
    progress.add(1, 80 * MB)
    assert lines() == [
        "Uploading 0 files, 50.0 MB, 500.0 kB/s",
        "Uploading 1 file, 80.0 MB, 400.0 kB/s",
    ]


def test_clock_starts_with_the_work(clock, lines):
    progress = Progress(LOG, "Uploading", clock=clock)
    clock.now += 3600
    with progress:
        progress.add(1, MB)
        assert lines() == []
        clock.now += 31
        progress.add(1, 30 * MB)
        assert progress.seconds == 31
    assert lines() == ["Uploading 2 files, 31.0 MB, 1.0 MB/s"]


def test_what_another_process_does_is_not_waited_for(clock, lines):
    progress = Progress(LOG, "Uploading", clock=clock)
    progress.expect(10, 100 * MB)
    progress.skip(5, 40 * MB)
    clock.now += 30
    progress.add(1, 30 * MB)
    assert lines() == ["Uploading 1/5 files, 30.0 MB of 60.0 MB, 1.0 MB/s, about 30 s left"]


def test_callback_is_called_every_tenth_of_a_second_and_at_the_end(clock, lines):
    updates = []
    with Progress(LOG, "Uploading", "gs://b/d", updates.append, clock=clock) as progress:
        progress.expect(100, 100 * MB)
        for _ in range(100):
            clock.now += 0.0101
            progress.add(1, MB)
    assert lines() == []
    assert [update.files for update in updates] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 100]
    assert updates[-1][:5] == ("Uploading", 100, 100 * MB, 100, 100 * MB)
    assert updates[-1].seconds == pytest.approx(1.01)


def test_callback_is_told_of_totals_only_where_they_are_known(clock):
    updates = []
    with Progress(LOG, "Hashing", callback=updates.append, clock=clock) as progress:
        progress.move(5)
    assert updates == [ProgressUpdate("Hashing", 0, 5, None, None, 0.0)]


def test_what_a_callback_raises_ends_the_work(clock):
    def cancel(update: ProgressUpdate) -> None:
        raise KeyboardInterrupt

    progress = Progress(LOG, "Uploading", callback=cancel, clock=clock)
    clock.now += 1
    with pytest.raises(KeyboardInterrupt):
        progress.add(1, 1)
    clock.now += 1
    with pytest.raises(KeyboardInterrupt):  # and nothing stays locked
        progress.add(1, 1)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("activity", ["Hashing", "Uploading", "Downloading"])
def test_whatever_a_callback_raises_is_raised_where_the_work_was_asked_for(
    tree, gcs_server, gcs_bucket, tmp_path, activity, error
):
    gcs_server.add_fault(Fault(latency=0.2, times=0))

    def cancel(update):
        if update.activity == activity:
            raise error("enough")

    root = str(tree({"a": "12", "b/c": "345"}))
    if activity == "Downloading":
        uri = upload_data(gcs_bucket, root)
        with pytest.raises(error, match="enough"):
            materialize(make_data_ref(uri, True), str(tmp_path / "copy"), progress=cancel)
        assert not (tmp_path / "copy").exists()
    else:
        with pytest.raises(error, match="enough"):
            upload_data(gcs_bucket, root, progress=cancel)
        assert not [name for name in gcs_server.objects(gcs_bucket) if "marker" in name]


def test_callback_is_never_called_after_a_failure():
    updates = []
    with pytest.raises(OSError, match="full"), Progress(LOG, "Hashing", callback=updates.append):
        raise OSError("full")
    assert updates == []


def test_callback_is_never_called_from_two_threads_at_once(monkeypatch):
    monkeypatch.setattr(module, "CALLBACK_INTERVAL_SECONDS", 0.0)
    inside, entered, leave = [], threading.Event(), threading.Event()

    def callback(update: ProgressUpdate) -> None:
        inside.append(update)
        entered.set()
        leave.wait(10)

    progress = Progress(LOG, "Hashing", callback=callback)
    thread = threading.Thread(target=progress.add, args=(1, 1))
    thread.start()
    assert entered.wait(10)
    progress.add(1, 1)  # returns at once
    assert len(inside) == 1
    leave.set()
    thread.join(10)
    progress.add(1, 1)
    assert [update.files for update in inside] == [1, 3]


def test_hashing_tells_a_callback_how_far_it_is(tree):
    updates = []
    snapshot = take_snapshot(str(tree({"a": "12", "b/c": "345"})), progress=updates.append)
    assert updates[-1][:5] == ("Hashing", 2, 5, None, None)
    assert snapshot.total_bytes == 5


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (4.2e12, "4.2 TB")],
)
def test_bytes_are_shown_in_powers_of_a_thousand(count, text):
    assert format_bytes(count) == text


class SlowStore(MemoryStore):
    """Takes 31 s for each file."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def upload(self, files, done, moved=ignore_moved):
        def late(upload, was_sent):
            self._clock.now += 31
            done(upload, was_sent)

        super().upload(files, late, moved)


def test_after_a_resume_the_time_left_is_that_of_what_is_missing(tree, clock, lines):
    root = tree({str(number): "x" * 3100 for number in range(4)})
    snapshot = take_snapshot(str(root))
    key = CacheKey("memory-bucket", "default", snapshot.content_hash, KERAS_REMOTE)
    store = SlowStore(clock)
    for name in ("0", "1"):
        store.replace(key.object_name(name), b"x" * 3100)
    publish(store, key, snapshot, Progress(LOG, "Uploading", clock=clock), "no marker")
    assert lines() == [
        "Uploading 1/2 files, 3.1 kB of 6.2 kB, 100 B/s, about 31 s left",
        "Uploading 2/2 files, 6.2 kB of 6.2 kB, 100 B/s, about 0 s left",
    ]


@pytest.fixture
def told(monkeypatch, lines):
    """Every state is a line."""
    monkeypatch.setattr(module, "LINE_INTERVAL_SECONDS", 0.0)
    return lines


def amounts(lines, activity):
    return [
        re.search(r" files?, (\S+ \S+ of \S+ \S+),", line)[1]
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
    told_again = [line for line in told() if f"{tmp_path}/.keras-remote" in line]
    assert amounts(told_again, "Hashing")[-1] == "21.0 MB of 21.0 MB"


def test_download_of_more_than_one_batch_has_the_totals_of_the_receipt(tree, gcs_bucket, tmp_path):
    uri = upload(gcs_bucket, tree(dict.fromkeys("abcde", "1234"))).gcs_uri
    (tmp_path / "copy").mkdir()
    updates = []
    with open_bucket(gcs_bucket) as store:
        source = RemoteData(store, DataRef(uri, True))
        download(source, str(tmp_path / "copy"), updates.append, batch_objects=2)
    assert updates[-1][:5] == ("Downloading", 5, 20, 5, 20)


def test_callback_is_told_of_each_part_of_the_work(tree, gcs_bucket, tmp_path):
    root = str(tree({"a": "12", "b/c": "345"}))
    updates = []

    def last_ones():
        last = {update.activity: update[1:5] for update in updates}
        updates.clear()
        return last

    Data(root).content_hash(progress=updates.append)
    assert last_ones() == {"Hashing": (2, 5, None, None)}
    uri = upload_data(gcs_bucket, root, progress=updates.append)
    assert last_ones() == {"Hashing": (2, 5, None, None), "Uploading": (2, 5, 2, 5)}
    upload(gcs_bucket, root, progress=updates.append)  # a hit
    assert last_ones() == {"Hashing": (2, 5, None, None)}
    materialize(make_data_ref(uri, True), str(tmp_path / "copy"), progress=updates.append)
    assert last_ones() == {"Downloading": (2, 5, 2, 5), "Hashing": (2, 5, 2, 5)}
