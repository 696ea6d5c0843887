"""A destination is filled under another name, by one process at a time."""

import fcntl
import os
import threading
from contextlib import suppress

import pytest

from keras_remote_airflow.core.disk.destination import (
    check_dest,
    is_taken,
    locked,
    partial_name,
    put,
)
from keras_remote_airflow.core.errors import InvalidInputError

from .conftest import needs_flock


@pytest.fixture
def partial(tmp_path):
    return tmp_path / partial_name("final")


@pytest.fixture(params=[pytest.param("flock", marks=needs_flock), "no flock"])
def any_lock(request, monkeypatch):
    if request.param == "no flock":
        monkeypatch.delattr(fcntl, "flock", raising=False)


@pytest.fixture
def no_flock(monkeypatch):
    monkeypatch.delattr(fcntl, "flock", raising=False)


@pytest.mark.usefixtures("any_lock")
def test_it_is_an_empty_directory_of_this_user_alone_and_goes_at_the_end(partial):
    with locked(str(partial)):
        assert os.listdir(partial) == []
        assert partial.stat().st_mode & 0o777 == 0o700
        (partial / "sub").mkdir()
        (partial / "sub" / "file").touch()
    assert not partial.exists()


@pytest.mark.usefixtures("any_lock")
def test_it_goes_when_the_work_fails(partial):
    with suppress(ZeroDivisionError), locked(str(partial)):
        (partial / "file").touch()
        1 / 0  # noqa: B018 - it fails
    assert not partial.exists()


@pytest.mark.usefixtures("any_lock")
def test_what_was_renamed_into_place_stays(partial, tmp_path):
    with locked(str(partial)):
        (partial / "data").mkdir()
        (partial / "data" / "file").touch()
        assert put(str(partial / "data"), str(tmp_path / "final"))
    assert os.listdir(tmp_path) == ["final"]
    assert (tmp_path / "final" / "file").exists()


@pytest.mark.usefixtures("any_lock")
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_directory_is_refused_and_left_alone(partial, tmp_path, kind):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    if kind == "link":
        partial.symlink_to(tmp_path / "precious")
    else:
        partial.touch()
    with pytest.raises(InvalidInputError, match="remove it"), locked(str(partial)):
        pass
    assert os.path.lexists(partial)
    assert (tmp_path / "precious" / "file").exists()


@needs_flock
def test_what_a_killed_process_left_is_swept(partial, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (partial / "sub").mkdir(parents=True)
    (partial / "file").touch()
    (partial / "link").symlink_to(tmp_path / "elsewhere")
    with locked(str(partial)):
        assert os.listdir(partial) == []
    assert (tmp_path / "elsewhere" / "file").exists()


@needs_flock
@pytest.mark.parametrize("is_renamed", [True, False])
def test_a_second_one_waits_and_gets_a_directory_of_its_own(
    partial, tmp_path, is_renamed, monkeypatch
):
    waiting, seen = threading.Event(), []
    system_flock = fcntl.flock

    def flock(descriptor, operation):
        if operation == fcntl.LOCK_EX:
            waiting.set()
        system_flock(descriptor, operation)

    def second():
        with locked(str(partial)):
            seen.append(os.listdir(partial))

    monkeypatch.setattr(fcntl, "flock", flock)
    thread = threading.Thread(target=second)
    with locked(str(partial)):
        (partial / "file").touch()
        thread.start()
        assert waiting.wait(30)
        assert seen == []
        if is_renamed:
            put(str(partial), str(tmp_path / "final"))
    thread.join(30)
    assert seen == [[]]
    assert not partial.exists()
    assert (tmp_path / "final" / "file").exists() == is_renamed


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_second_one_fails_and_touches_nothing(partial):
    with locked(str(partial)):
        (partial / "file").touch()
        with pytest.raises(BlockingIOError, match=partial.name), locked(str(partial)):
            pass
        assert os.listdir(partial) == ["file"]
    with locked(str(partial)):
        pass


@pytest.mark.usefixtures("no_flock")
def test_without_flock_what_a_killed_process_left_has_to_be_removed(partial):
    partial.mkdir()
    with pytest.raises(BlockingIOError, match="remove"), locked(str(partial)):
        pass
    partial.rmdir()
    with locked(str(partial)):
        pass


def test_a_short_name_follows_from_that_of_the_destination():
    names = {partial_name(f"/some/{name}") for name in ("a", "b", "x" * 255, "é", "\udcff")}
    assert len(names) == 5
    assert partial_name("/other/a") in names
    assert max(map(len, names)) < 50


def test_only_an_empty_directory_or_nothing_is_not_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    taken = {name: is_taken(str(tmp_path / name)) for name in ("nothing", *os.listdir(tmp_path))}
    expected = {"nothing": False, "empty": False, "link": True, "broken": True, "file": True}
    assert taken == expected
    assert is_taken(str(tmp_path))


def test_a_file_or_a_link_to_an_empty_directory_is_no_destination(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for name in ("file", "link", "broken"):
        with pytest.raises(InvalidInputError, match=name):
            check_dest(str(tmp_path / name))
    for name in ("nothing", "empty", "nothing/below"):
        assert check_dest(str(tmp_path / name)) == str(tmp_path / name)


def test_an_empty_directory_hands_its_mode_on(tmp_path):
    for name in ("data", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty").chmod(0o750)
    assert put(str(tmp_path / "data"), str(tmp_path / "empty"))
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["empty"]
