"""A cache of copies: those that no process uses make room, the least recently used one first."""

import fcntl
import os
import stat
from contextlib import contextmanager

import pytest

from keras_remote_airflow.core.disk.cache import hold, make_room, open_cache, release
from keras_remote_airflow.core.disk.partial import partial_name
from keras_remote_airflow.core.errors import InvalidInputError

from .conftest import needs_flock

pytestmark = needs_flock


@pytest.fixture
def cache(tmp_path):
    """Three copies of 1,000 bytes that no process uses, the one called 2… least recently."""
    for age, digit in enumerate("132"):
        copy = tmp_path / (digit * 64)
        (copy / "sub").mkdir(parents=True)
        for name in ("a", "sub/b"):
            (copy / name).write_bytes(bytes(500))
        use = tmp_path / f".keras-remote-{copy.name}.use"
        use.touch()
        os.utime(use, (1e9 - age, 1e9 - age))
    return tmp_path


def copies(cache):
    return "".join(sorted(name[0] for name in os.listdir(cache) if len(name) == 64))


@contextmanager
def another_process(work, *args):
    """Another process that has done this work, and goes on until the end."""
    (told, tell), (end, let_end) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(let_end)
            work(*args)
            os.write(tell, b".")
            os.read(end, 1)
        finally:
            os._exit(0)
    os.close(tell)
    try:
        assert os.read(told, 1) == b"."
        yield pid
    finally:
        os.close(let_end)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(end)


@pytest.mark.parametrize(
    ("max_bytes", "needed", "left"),
    [(3000, 0, "123"), (2999, 0, "13"), (2000, 1, "1"), (1000, 0, "1"), (0, 0, "")],
)
def test_least_recently_used_copies_go_until_the_others_fit(cache, max_bytes, needed, left):
    make_room(str(cache), max_bytes, needed)
    assert copies(cache) == left
    assert len(os.listdir(cache)) == 2 * len(left)  # each with its other file


def test_copy_stays_while_another_process_uses_it_however_that_ends(cache):
    oldest = str(cache / ("2" * 64))
    with another_process(hold, oldest):
        make_room(str(cache), 0)
        assert copies(cache) == "2"
    make_room(str(cache), 0)
    assert copies(cache) == ""


def test_copy_that_this_process_uses_stays(cache):
    hold(str(cache / ("2" * 64)))
    hold(str(cache / ("2" * 64)))
    make_room(str(cache), 1500)
    assert copies(cache) == "2"


def test_use_makes_a_copy_the_most_recently_used(cache):
    with another_process(hold, str(cache / ("2" * 64))):
        pass
    make_room(str(cache), 1000)
    assert copies(cache) == "2"


def test_copy_may_be_held_before_it_is_there_and_after_its_cache_was_removed(tmp_path):
    copy = tmp_path / "cache" / ("1" * 64)
    for _ in range(2):
        hold(str(copy))
        copy.mkdir()
        make_room(str(copy.parent), 0)
        assert copies(copy.parent) == "1"
        os.unlink(copy.parent / f".keras-remote-{copy.name}.use")
        copy.rmdir()


def test_descriptor_that_has_become_another_files_is_not_closed(tmp_path):
    copy, use = tmp_path / ("1" * 64), tmp_path / f".keras-remote-{'1' * 64}.use"
    hold(str(copy))
    [number] = [n for n in range(3, 1000) if same(n, use)]
    with open(__file__, "rb") as file:
        os.dup2(file.fileno(), number)  # as in a daemon, which closes all that it inherits
        use.unlink()
        hold(str(copy))
        assert same(number, __file__)
        make_room(str(tmp_path), 0)
    os.close(number)


def same(number, path):
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except OSError:
        return False


def test_copy_is_held_again_after_its_download_failed(cache):
    copy = str(cache / ("2" * 64))
    with another_process(hold, copy):
        hold(copy)
        release(copy)
        hold(copy)
    make_room(str(cache), 0)
    assert copies(cache) == "2"


def test_limit_that_copies_in_use_exceed_is_told(cache, caplog):
    with another_process(hold, str(cache / ("2" * 64))):
        make_room(str(cache), 999)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "1.0 kB" in warning
    assert "999 B" in warning
    assert str(cache) in warning


def test_copy_that_is_larger_than_the_limit_is_told_as_such(cache, caplog):
    with another_process(hold, str(cache / ("2" * 64))):
        with another_process(hold, str(cache / ("3" * 64))):
            make_room(str(cache), 1500)
        make_room(str(cache), 999)
    several, alone = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "alone" not in several
    assert "one copy alone takes 1.0 kB" in alone


def test_what_killed_processes_left_goes_and_other_files_stay(cache):
    (cache / partial_name("1" * 64)).mkdir(0o700)
    (cache / partial_name("1" * 64) / "data").mkdir()
    (cache / "mine").mkdir()
    (cache / ("0" * 64)).mkdir()
    (cache / ("0" * 64) / "of another program").write_bytes(bytes(5000))
    (cache / ("4" * 64)).write_bytes(bytes(5000))
    (cache / ("5" * 64)).symlink_to(cache / "mine")
    make_room(str(cache), None)
    assert copies(cache) == "012345"
    assert not list(cache.glob("*.partial"))
    make_room(str(cache), 0)
    assert sorted(os.listdir(cache)) == ["0" * 64, "4" * 64, "5" * 64, "mine"]


@pytest.mark.parametrize("without", ["flock", "locks"])
def test_nothing_goes_where_it_cannot_be_told_what_is_in_use(cache, monkeypatch, without):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    if without == "flock":
        monkeypatch.delattr(fcntl, "flock")
    else:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    hold(str(cache / ("1" * 64)))
    make_room(str(cache), 0)
    assert copies(cache) == "123"


def test_default_cache_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert open_cache() == open_cache()
    assert stat.S_IMODE(os.stat(open_cache()).st_mode) == 0o700


def test_cache_dir_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_cache("~/cache") == str(tmp_path / "cache")
    (tmp_path / "link").symlink_to(tmp_path)
    assert open_cache(tmp_path / "link") == str(tmp_path / "link")
    for bad in ("", 5, __file__):
        with pytest.raises(InvalidInputError, match="cache_dir"):
            open_cache(bad)


def test_missing_temporary_directory_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"cache_dir.*gone"):
        open_cache()
