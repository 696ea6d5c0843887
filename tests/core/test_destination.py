"""A destination is filled under another name, by one process at a time."""

import ctypes
import errno
import fcntl
import os
import subprocess
import threading
from contextlib import suppress

import pytest

from keras_remote_airflow.core.disk.destination import (
    check_dest,
    exchange,
    holds_mount_point,
    is_taken,
    put,
)
from keras_remote_airflow.core.disk.partial import locked, partial_name, sweep
from keras_remote_airflow.core.disk.record import read_records, write_record
from keras_remote_airflow.core.errors import InvalidInputError

from .conftest import needs_flock


@pytest.fixture
def partial(tmp_path):
    return tmp_path / partial_name("final")


def take_flock_away(monkeypatch, where):
    """Play a system without flock, or a file system (Lustre, CIFS, FUSE) without it."""
    if where == "no flock":
        monkeypatch.delattr(fcntl, "flock", raising=False)
    elif where != "flock":
        error = OSError(getattr(errno, where), os.strerror(getattr(errno, where)))
        monkeypatch.setattr(fcntl, "flock", lambda *_: throw(error), raising=False)


def throw(error):
    raise error


@pytest.fixture(
    params=[pytest.param("flock", marks=needs_flock), "no flock", "ENOSYS", "EOPNOTSUPP"]
)
def any_lock(request, monkeypatch):
    take_flock_away(monkeypatch, request.param)


@pytest.fixture(params=["no flock", "ENOSYS"])
def no_flock(request, monkeypatch):
    take_flock_away(monkeypatch, request.param)


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


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@needs_root
@pytest.mark.usefixtures("any_lock")
@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_another_user_put_there_is_stepped_round(partial, tmp_path, kind):
    (tmp_path / "precious").mkdir()
    if kind == "directory":
        partial.mkdir()
        partial.chmod(0o777)
        (partial / "theirs").touch()
    elif kind == "file":
        partial.touch()
    else:
        partial.symlink_to(tmp_path / "precious")
    os.chown(partial, 12345, 12345, follow_symlinks=False)
    with locked(str(partial)) as used:
        assert used != str(partial)
        assert os.stat(used).st_uid == os.geteuid()
        assert os.stat(used).st_mode & 0o777 == 0o700
        assert os.path.dirname(used) == str(tmp_path)
    sweep(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([partial.name, "precious"])
    assert kind != "directory" or os.listdir(partial) == ["theirs"]


@needs_flock
def test_a_directory_of_ours_that_others_may_enter_is_closed_to_them(partial):
    partial.mkdir()
    partial.chmod(0o777)
    with locked(str(partial)) as used:
        assert used == str(partial)
        assert partial.stat().st_mode & 0o777 == 0o700


@needs_flock
def test_sweeping_leaves_alone_what_a_process_holds(partial, tmp_path):
    (tmp_path / partial_name("killed")).mkdir(0o700)
    link = tmp_path / partial_name("link")
    link.symlink_to(tmp_path)
    with locked(str(partial)):
        sweep(str(tmp_path))
        assert sorted(os.listdir(tmp_path)) == sorted([partial.name, link.name])


@pytest.fixture(params=["one step", "two renames"])
def any_exchange(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


@pytest.mark.usefixtures("any_exchange")
def test_directories_are_exchanged_and_the_old_one_goes(partial, tmp_path):
    final = tmp_path / "final"
    final.mkdir(0o750)
    (final / "old").touch()
    with locked(str(partial)):
        (partial / "data").mkdir()
        (partial / "data" / "new").touch()
        assert not put(str(partial / "data"), str(final))
        exchange(str(partial / "data"), str(final))
    assert os.listdir(tmp_path) == ["final"]
    assert os.listdir(final) == ["new"]
    assert final.stat().st_mode & 0o777 == 0o750


def test_exchange_that_fails_half_way_is_undone(partial, tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    (partial / "data").mkdir(parents=True)
    (tmp_path / "final").mkdir()
    rename = os.rename

    def fail_once(source, target):
        if str(source).endswith("data"):
            raise OSError(errno.EIO, "a broken disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="broken disk"):
        exchange(str(partial / "data"), str(tmp_path / "final"))
    assert (tmp_path / "final").is_dir()


def test_record_is_on_the_directory_or_beside_it(tmp_path, monkeypatch):
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
    new, final = str(tmp_path / "new"), str(tmp_path / "final")
    monkeypatch.setattr(
        os, "setxattr", lambda *_: throw(OSError(errno.ENOTSUP, "no")), raising=False
    )
    write_record(new, final, "1", beside=False)
    assert sorted(os.listdir(tmp_path)) == ["final", "new"]
    assert read_records(final) == set()
    for content_hash in "12":
        write_record(new, final, content_hash, beside=True)
    assert read_records(final) == set()
    os.rename(new, final)
    assert read_records(final) == {"1", "2"}
    assert read_records(new) == set()
    if os.geteuid() == 0:
        [record] = set(os.listdir(tmp_path)) - {"final"}
        os.chown(tmp_path / record, 12345, 12345)
        assert read_records(final) == set()


def test_record_beside_a_directory_is_not_about_one_that_took_its_place(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "setxattr", raising=False)
    (tmp_path / "final").mkdir()
    (tmp_path / "mine").mkdir()
    final = str(tmp_path / "final")
    write_record(final, final, "1", beside=True)
    assert read_records(final) == {"1"}
    os.rename(tmp_path / "mine", final)
    assert read_records(final) == set()


@pytest.mark.timeout(20)
def test_record_that_is_a_fifo_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "setxattr", raising=False)
    (tmp_path / "final").mkdir()
    final = str(tmp_path / "final")
    write_record(final, final, "1", beside=True)
    [record] = set(tmp_path.iterdir()) - {tmp_path / "final"}
    record.unlink()
    os.mkfifo(record)
    assert read_records(final) == set()
    with pytest.raises(OSError, match=record.name):
        write_record(final, final, "1", beside=True)


def test_file_that_came_meanwhile_stays_where_there_are_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: throw(OSError(errno.EPERM, "no")))
    for name in ("new", "final"):
        (tmp_path / name).write_text(name)
    assert not put(str(tmp_path / "new"), str(tmp_path / "final"))
    assert (tmp_path / "final").read_text() == "final"
    assert put(str(tmp_path / "new"), str(tmp_path / "free"))


@needs_flock
def test_read_only_directories_that_a_killed_process_left_are_removed(as_another_user):
    os.chmod(as_another_user, 0o777)
    os.seteuid(1000)
    partial, elsewhere = as_another_user / partial_name("final"), as_another_user / "elsewhere"
    elsewhere.mkdir(0o500)
    for folder in ("data/a", "data/b"):
        (partial / folder).mkdir(parents=True)
        (partial / folder / "file").touch()
    (partial / "data" / "link").symlink_to(elsewhere)
    for folder in ("data/a", "data/b", "data"):
        (partial / folder).chmod(0o500)
    with locked(str(partial)):
        assert os.listdir(partial) == []
    assert os.listdir(as_another_user) == ["elsewhere"]
    assert elsewhere.stat().st_mode & 0o777 == 0o500


@needs_root
def test_mount_of_a_directory_of_the_same_file_system_is_noticed(tmp_path):
    source, place = tmp_path / "source", tmp_path / "a place\\ here"
    for folder in (source, place):
        folder.mkdir()
    assert not holds_mount_point(str(place))
    mount = ["mount", "--bind", str(source), str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        assert holds_mount_point(str(place))
        assert holds_mount_point(str(tmp_path))
        assert not holds_mount_point(str(source))
        assert not os.path.ismount(place), "else this test shows nothing"
    finally:
        subprocess.run(["umount", str(place)], check=True)


@needs_root
def test_directory_of_a_containers_image_is_named_as_one_that_cannot_be_replaced(tmp_path):
    for name in ("image/final", "upper", "work", "root"):
        (tmp_path / name).mkdir(parents=True)
    folders = f"lowerdir={tmp_path}/image,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    root = tmp_path / "root"
    mount = ["mount", "-t", "overlay", "-o", folders, "overlay", str(root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount, and overlayfs")
    try:
        (root / "data").mkdir()
        with pytest.raises(OSError, match=f"container.*{root}/final"):
            exchange(str(root / "data"), str(root / "final"))
        assert sorted(os.listdir(root)) == ["data", "final"]
    finally:
        subprocess.run(["umount", str(root)], check=True)
