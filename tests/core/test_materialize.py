"""`materialize`: from a ref to verified bytes on disk, or an error and an untouched disk."""

import ctypes
import errno
import json
import os
import pathlib
import re
import stat
import tempfile
import tracemalloc
from typing import get_args

import pytest

from keras_remote_airflow import make_data_ref, materialize
from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import Page, list_objects
from keras_remote_airflow.core.datasets.download import download
from keras_remote_airflow.core.datasets.remote import RemoteData
from keras_remote_airflow.core.datasets.upload import upload
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.disk.partial import partial_name
from keras_remote_airflow.core.errors import IntegrityError, InvalidInputError, StoreError
from keras_remote_airflow.core.layout import CacheKey, LayoutName, get_layout
from keras_remote_airflow.core.refs import DataRef, parse_data_ref

from .conftest import needs_flock, on_disk, writes
from .memory_store import MemoryStore

FILES = {"train.csv": "t", "sub/eval.csv": "e", "sub/deeper/é.bin": "b" * 300_000}
WANTED = {name: content.encode() for name, content in FILES.items()}


@pytest.fixture(params=["keras_remote", "kinetic"])
def layout(request):
    return request.param


@pytest.fixture
def directory(tree, gcs_bucket, layout):
    """The ref of a published directory."""
    result = upload(gcs_bucket, str(tree(FILES)), layout=layout)
    return DataRef(result.gcs_uri, True, None, get_layout(layout)).to_dict()


@pytest.fixture
def single(tree, gcs_bucket, layout):
    """The ref of a published file."""
    path = tree({"config.json": '{"a":1}'}, "single") / "config.json"
    result = upload(gcs_bucket, str(path), layout=layout)
    return DataRef(result.gcs_uri, False, None, get_layout(layout)).to_dict()


def test_directory_becomes_the_destination(directory, tmp_path):
    dest = tmp_path / "out"
    assert materialize(directory, str(dest)) == str(dest)
    assert on_disk(dest) == WANTED


def test_file_goes_into_the_destination_under_its_own_name(single, tmp_path):
    dest = tmp_path / "out"
    assert materialize(single, str(dest)) == str(dest / "config.json")
    assert on_disk(dest) == {"config.json": b'{"a":1}'}


def test_destination_may_have_missing_parents_and_a_trailing_slash(directory, tmp_path):
    dest = tmp_path / "a" / "b" / "c"
    assert materialize(directory, f"{dest}/") == str(dest)
    assert on_disk(dest) == WANTED


def test_relative_destination_is_returned_absolute(single, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert materialize(directory, "out") == str(tmp_path / "out")
    assert materialize(directory, "out") == str(tmp_path / "out")
    assert materialize(single, "one") == str(tmp_path / "one" / "config.json")


@pytest.mark.parametrize("spell", [json.dumps, repr, parse_data_ref])
def test_ref_may_be_text_or_parsed(directory, tmp_path, spell):
    materialize(spell(directory), str(tmp_path / "out"))
    assert on_disk(tmp_path / "out") == WANTED


def test_ref_of_kinetic_itself_is_understood(tree, gcs_bucket, tmp_path):
    result = upload(gcs_bucket, str(tree(FILES)), layout="kinetic")
    ref = {"__data_ref__": True, "uri": result.gcs_uri, "is_dir": True, "fuse": False}
    assert on_disk(pathlib.Path(materialize(ref, str(tmp_path / "out")))) == WANTED


def test_mount_path_is_the_default_destination(directory, single, tmp_path):
    for ref in (directory, single):
        ref["mount_path"] = str(tmp_path / f"mnt-{ref['is_dir']}")
    assert materialize(directory) == directory["mount_path"]
    assert materialize(single) == f"{single['mount_path']}/config.json"
    assert materialize(directory, str(tmp_path / "named")) == str(tmp_path / "named")


def test_default_destination_belongs_to_this_user_alone(directory, single, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    home = tmp_path / f"keras-remote-data-{os.getuid()}"
    paths = [materialize(directory), materialize(single)]
    assert paths[0] == str(home / directory["gcs_uri"].rpartition("/")[2])
    assert paths[1] == str(home / single["gcs_uri"].rpartition("/")[2] / "config.json")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert [materialize(directory), materialize(single)] == paths


@pytest.mark.parametrize("trap", ["open to all", "a link", "a file"])
def test_default_destination_that_others_prepared_is_refused(
    directory, tmp_path, monkeypatch, trap
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    home = tmp_path / f"keras-remote-data-{os.getuid()}"
    if trap == "a link":
        home.symlink_to(tmp_path)
    elif trap == "a file":
        home.write_text("")
    else:
        home.mkdir()
        home.chmod(0o777)
    with pytest.raises(InvalidInputError, match=str(home)):
        materialize(directory)


def test_what_is_there_already_is_reused(tree, gcs_server, gcs_bucket, tmp_path):
    root = tree(FILES)
    refs = [
        make_data_ref(upload(gcs_bucket, str(root)).gcs_uri, True),
        make_data_ref(upload(gcs_bucket, str(root / "train.csv")).gcs_uri, False),
    ]
    for ref in refs:
        dest = str(tmp_path / f"out-{ref['is_dir']}")
        path = materialize(ref, dest)
        inode = os.stat(path).st_ino
        gcs_server.clear_requests()
        assert materialize(ref, dest) == path
        assert os.stat(path).st_ino == inode
        assert [r for r in gcs_server.requests if r.query.get("alt") == "media"] == []


def test_directory_that_is_there_already_needs_no_network(directory, tmp_path, monkeypatch):
    path = materialize(directory, str(tmp_path / "out"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    assert materialize(directory, path) == path


def test_empty_destination_is_filled(directory, tmp_path):
    (tmp_path / "out").mkdir()
    materialize(directory, str(tmp_path / "out"))
    assert on_disk(tmp_path / "out") == WANTED


OTHER_CONTENTS = {
    "another file": lambda dest: (dest / "mine.txt").write_text("mine"),
    "a changed file": lambda dest: (dest / "train.csv").write_text("T"),
    "an extra file": lambda dest: (dest / "extra").write_text(""),
    "a file less": lambda dest: (dest / "train.csv").unlink(),
    # What a hash does not show. Readers that list the directories would see a class more.
    "an empty directory": lambda dest: (dest / "sub" / "labels").mkdir(),
    "a linked directory": lambda dest: (dest / "sub" / "more").symlink_to(dest.parent),
}


@pytest.mark.parametrize("spoil", OTHER_CONTENTS.values(), ids=OTHER_CONTENTS)
def test_destination_that_holds_something_else_is_refused_and_untouched(directory, tmp_path, spoil):
    dest = tmp_path / "out"
    materialize(directory, str(dest))
    spoil(dest)
    before = on_disk(dest)
    with pytest.raises(InvalidInputError) as caught:
        materialize(directory, str(dest))
    assert str(dest) in str(caught.value).partition(". ")[0]
    assert directory["gcs_uri"] in str(caught.value)
    assert str(caught.value).count(directory["gcs_uri"].rpartition("/")[2]) == 1
    assert on_disk(dest) == before
    assert sorted(os.listdir(tmp_path)) == ["data", "out"]


LARGE = {
    "a large file": lambda dest: os.truncate(dest / "mine", 100_000_001),
    "many files": lambda dest: [(dest / str(number)).touch() for number in range(1001)],
}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("spoil", LARGE.values(), ids=LARGE)
def test_large_destination_of_other_numbers_is_refused_unread(
    directory, single, tree, tmp_path, spoil, replace
):
    dest = tree({"mine": "mine", "config.json": ""}, "out")
    spoil(dest)
    os.truncate(dest / "config.json", 100_000_001)
    for ref in (directory, single):
        with pytest.raises(InvalidInputError, match=str(dest)):
            materialize(ref, dest, replace=replace, progress=lambda _: pytest.fail("read"))


@pytest.mark.parametrize("marker", ["as it is", "gone"])
@pytest.mark.parametrize("replace", [False, True])
def test_large_destination_without_a_record_is_reused_if_it_is_the_data(
    directory, tree, tmp_path, gcs_server, monkeypatch, marker, replace
):
    monkeypatch.setattr("keras_remote_airflow.core.datasets.materialize.UNASKED_FILES", 0)
    dest = tree(FILES, "out")
    if marker == "gone":
        bucket = directory["gcs_uri"].split("/")[2]
        for name in [n for n in gcs_server.objects(bucket) if "marker" in n]:
            gcs_server.delete(bucket, name)
    inode = dest.stat().st_ino
    assert materialize(directory, dest, replace=replace) == str(dest)
    assert dest.stat().st_ino == inode
    (dest / "train.csv").write_text("T")  # the same numbers
    with pytest.raises(InvalidInputError, match=str(dest)):
        materialize(directory, dest, replace=replace)
    assert (dest / "train.csv").read_text() == "T"


def test_large_destination_is_reused_in_an_outage_or_the_outage_is_told(
    directory, tree, tmp_path, monkeypatch
):
    monkeypatch.setattr("keras_remote_airflow.core.datasets.materialize.UNASKED_FILES", 0)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    dest = tree(FILES, "out")
    at_once = RetryPolicy(deadline=0)
    assert materialize(directory, dest, retry=at_once) == str(dest)
    (dest / "train.csv").unlink()
    with pytest.raises(StoreError):
        materialize(directory, dest, retry=at_once)


def test_numbers_come_first_and_names_are_relative(directory, tree, tmp_path, layout):
    dest = tree({"precious": "mine"}, "out")
    with pytest.raises(InvalidInputError) as caught:
        materialize(directory, dest)
    first, rest = str(caught.value).split(f": {dest}. ")
    if layout == "keras_remote":  # the other's marker has no numbers
        assert re.findall(r"\d+ files?", first) == ["1 file", "3 files"]
        assert len(first) <= 90
    assert {"sub/eval.csv is missing", "train.csv is missing"} < set(rest.split("; "))
    assert "precious is not in" in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [*OTHER_CONTENTS.values(), lambda copy: os.mkfifo(copy / "pipe")],
    ids=[*OTHER_CONTENTS, "a FIFO"],
)
def test_copy_of_our_own_that_was_changed_is_downloaded_again(
    directory, tmp_path, monkeypatch, spoil, caplog
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copy = pathlib.Path(materialize(directory))
    spoil(copy)
    assert materialize(directory) == str(copy)
    assert on_disk(copy) == WANTED
    assert {path for path in copy.rglob("*") if path.is_dir()} == {
        copy / "sub",
        copy / "sub" / "deeper",
    }
    assert str(copy) in caplog.text
    assert not list(copy.parent.glob("*.partial"))


def test_file_of_our_own_that_was_changed_is_downloaded_again(single, tmp_path):
    path = materialize(single, cache_dir=tmp_path / "cache")
    for content in ("{}", ""):
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
        assert materialize(single, cache_dir=tmp_path / "cache") == path
        assert on_disk(tmp_path / "cache" / os.path.basename(os.path.dirname(path))) == {
            "config.json": b'{"a":1}'
        }


# Another dataset in its place.


@pytest.fixture
def tomorrows(tree, gcs_bucket):
    """The ref of what `directory` and `single` may be replaced with."""
    root = tree({"train.csv": "T", "config.json": "{}"}, "tomorrow")
    return {
        True: make_data_ref(upload(gcs_bucket, str(root)).gcs_uri, True),
        False: make_data_ref(upload(gcs_bucket, str(root / "config.json")).gcs_uri, False),
    }


@pytest.fixture(params=["attributes", "no attributes"])
def any_record(request, monkeypatch):
    if request.param == "no attributes":  # as on macOS
        monkeypatch.delattr(os, "setxattr", raising=False)
        monkeypatch.delattr(os, "getxattr", raising=False)


@pytest.mark.usefixtures("any_record")
def test_what_was_put_there_is_replaced_again_and_again(directory, tomorrows, tmp_path):
    dest = tmp_path / "out"
    for ref, wanted in [
        (directory, WANTED),
        (tomorrows[True], {"train.csv": b"T", "config.json": b"{}"}),
        (directory, WANTED),
        (directory, WANTED),
    ]:
        assert materialize(ref, dest, replace=True) == str(dest)
        assert on_disk(dest) == wanted
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("any_record")
def test_file_that_was_put_there_is_replaced(single, tomorrows, tmp_path):
    dest = tmp_path / "out"
    materialize(single, dest, replace=True)
    (dest / "neighbour").write_text("mine")
    materialize(tomorrows[False], dest, replace=True)
    materialize(tomorrows[False], dest, replace=True)
    left = {name: data for name, data in on_disk(dest).items() if not name.endswith(".record")}
    assert left == {"config.json": b"{}", "neighbour": b"mine"}


@pytest.mark.usefixtures("any_record")
@pytest.mark.parametrize("spoil", OTHER_CONTENTS.values(), ids=OTHER_CONTENTS)
def test_what_was_changed_since_is_not_replaced(directory, tomorrows, tmp_path, spoil, gcs_server):
    dest = tmp_path / "out"
    materialize(directory, dest, replace=True)
    spoil(dest)
    before = on_disk(dest)
    gcs_server.clear_requests()
    for ref in (tomorrows[True], directory):
        with pytest.raises(InvalidInputError, match="changed") as caught:
            materialize(ref, dest, replace=True)
        assert str(dest) in str(caught.value)
    assert on_disk(dest) == before
    media = {r.object_name for r in gcs_server.requests if r.query.get("alt") == "media"}
    assert not any("train.csv" in str(name) for name in media)


def test_what_others_put_there_is_not_replaced(directory, single, tree, tmp_path):
    dest = tree({"mine": "mine", "config.json": "mine"}, "out")
    for ref in (directory, single):
        with pytest.raises(InvalidInputError, match=str(dest)):
            materialize(ref, dest, replace=True)
    assert on_disk(dest) == {"mine": b"mine", "config.json": b"mine"}


def test_what_changes_while_the_next_is_downloaded_is_not_replaced(directory, tomorrows, tmp_path):
    dest = tmp_path / "out"
    materialize(directory, dest, replace=True)

    def spoil(update):
        if update.activity == "Downloading":
            (dest / "precious").write_text("mine")

    with pytest.raises(InvalidInputError, match="changed"):
        materialize(tomorrows[True], dest, replace=True, progress=spoil)
    assert on_disk(dest) == WANTED | {"precious": b"mine"}
    assert not list(tmp_path.glob("*.partial"))


def test_another_process_may_replace_it_while_it_is_read(directory, tomorrows, tmp_path):
    dest = tmp_path / "out"
    materialize(directory, dest, replace=True)
    others = iter([tomorrows[True]])

    def replace(update):
        for ref in others:
            materialize(ref, dest, replace=True)

    materialize(tomorrows[True], dest, replace=True, progress=replace)
    assert on_disk(dest) == {"train.csv": b"T", "config.json": b"{}"}


def without_records(root: pathlib.Path) -> dict[str, bytes]:
    """Return every file below `root`, but the records of systems without extended attributes."""
    return {name: of for name, of in on_disk(root).items() if not name.endswith(".record")}


@pytest.mark.parametrize("moment", ["one step", "two renames"])
def test_what_changes_in_the_last_moment_is_not_replaced(
    directory, single, tomorrows, tmp_path, moment, monkeypatch
):
    if moment == "two renames":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    hashed = []

    def spoil(update):  # once the new data was hashed, and what is there for the second time
        hashed.append(update.activity)
        if hashed[-1] == "Hashing" and hashed.count("Hashing") == 3:
            path.write_text("mine")

    for ref, path in (
        (directory, tmp_path / "out" / "new"),
        (single, tmp_path / "1" / "config.json"),
    ):
        hashed.clear()
        materialize(ref, path.parent, replace=True)
        before = without_records(path.parent)
        with pytest.raises(InvalidInputError, match="changed"):
            materialize(tomorrows[ref["is_dir"]], path.parent, replace=True, progress=spoil)
        assert without_records(path.parent) == before | {path.name: b"mine"}
        assert not list(tmp_path.rglob("*.partial"))


def test_what_was_made_read_only_is_replaced_and_removed(directory, tomorrows, as_another_user):
    os.chmod(as_another_user, 0o777)
    os.seteuid(1000)
    dest = as_another_user / "out"
    materialize(directory, dest, replace=True)
    for folder in (dest / "sub", dest):
        folder.chmod(0o555)
    materialize(tomorrows[True], dest, replace=True)
    assert on_disk(dest) == {"train.csv": b"T", "config.json": b"{}"}
    assert {name.split("/")[0] for name in without_records(as_another_user)} == {"out"}


def test_link_is_not_replaced(directory, tomorrows, tmp_path):
    materialize(directory, tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(InvalidInputError, match="link"):
        materialize(tomorrows[True], tmp_path / "out", replace=True)
    assert on_disk(tmp_path / "real") == WANTED


def test_reader_of_what_is_replaced_keeps_what_it_has_opened(directory, tomorrows, tmp_path):
    dest = tmp_path / "out"
    materialize(directory, dest, replace=True)
    with (dest / "train.csv").open() as file:
        materialize(tomorrows[True], dest, replace=True)
        assert file.read() == "t"
    assert (dest / "train.csv").read_text() == "T"


# Places where this user may not do everything.


def test_dest_whose_parent_is_not_writable_is_refused_with_a_way_out(directory, as_another_user):
    dest = as_another_user / "mine"
    dest.mkdir()
    dest.chmod(0o777)
    os.seteuid(1000)
    with pytest.raises(InvalidInputError) as caught:
        materialize(directory, dest)
    for fact in (f"permission denied by {as_another_user},", f" {dest}.", f" {dest}/data"):
        assert fact in str(caught.value)
    assert on_disk(pathlib.Path(materialize(directory, dest / "data"))) == WANTED


def test_dest_in_a_closed_directory_is_refused_and_the_directory_named(directory, as_another_user):
    closed = as_another_user / "closed"
    (closed / "sub").mkdir(parents=True)
    closed.chmod(0o700)
    os.seteuid(1000)
    for ref_dest in (closed / "sub", closed / "sub" / "new", closed):
        with pytest.raises(InvalidInputError, match=f"permission denied by {closed},"):
            materialize(directory, ref_dest)


def test_changed_copy_of_another_user_is_named_as_such(directory, as_another_user):
    cache = as_another_user / "cache"
    copy = materialize(directory, cache_dir=cache)
    cache.chmod(0o1777)
    pathlib.Path(copy, "extra").touch()
    os.seteuid(1000)
    with pytest.raises(PermissionError, match=f"another user's.*{copy}"):
        materialize(directory, cache_dir=cache)


def test_what_is_whole_is_used_without_a_write(directory, single, as_another_user):
    dest = as_another_user / "shared"
    cache = as_another_user / "cache"
    paths = [
        [materialize(ref, dest / str(ref["is_dir"])), materialize(ref, cache_dir=cache)]
        for ref in (directory, single)
    ]
    for folder in (dest, cache):
        folder.chmod(0o755)
    os.seteuid(1000)
    for ref, (there, copy) in zip((directory, single), paths, strict=True):
        assert materialize(ref, dest / str(ref["is_dir"])) == there
        assert materialize(ref, cache_dir=cache) == copy


# A cache of copies.


def test_cache_dir_goes_before_the_refs_mount_path(directory, tmp_path):
    directory["mount_path"] = str(tmp_path / "mount")
    name = directory["gcs_uri"].rpartition("/")[2]
    assert materialize(directory, cache_dir=tmp_path) == str(tmp_path / name)


@needs_flock
def test_copies_that_no_process_uses_make_room(directory, single, tmp_path):
    cache = tmp_path / "cache"
    old = cache / ("0" * 64)
    old.mkdir(parents=True)
    (cache / f".keras-remote-{old.name}.use").touch()
    (old / "file").write_bytes(bytes(500_000))
    kept = materialize(directory, cache_dir=cache)
    assert old.exists()
    path = materialize(single, cache_dir=cache, cache_max_bytes=400_000)
    assert not old.exists()
    materialize(single, cache_dir=cache, cache_max_bytes=0)
    assert on_disk(pathlib.Path(kept)) == WANTED  # this process uses it
    assert os.path.exists(path)


@needs_flock
def test_room_is_made_before_the_download(directory, tmp_path):
    old = tmp_path / ("0" * 64)
    old.mkdir()
    (tmp_path / f".keras-remote-{old.name}.use").touch()
    (old / "file").write_bytes(bytes(500_000))
    seen = []

    def look(update):
        if update.activity == "Downloading":
            seen.append(old.exists())

    materialize(directory, cache_dir=tmp_path, cache_max_bytes=500_000, progress=look)
    assert set(seen) == {False}


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ({"dest": "out", "cache_dir": "cache"}, "dest"),
        ({"dest": "out", "cache_max_bytes": 5}, "cache_max_bytes"),
        ({"cache_dir": "cache", "replace": True}, "replace"),
        ({"replace": True}, "replace"),
        ({"cache_max_bytes": -1}, "-1"),
        ({"cache_max_bytes": "1 GB"}, "1 GB"),
        ({"cache_max_bytes": True}, "True"),
        ({"cache_dir": ""}, "cache_dir"),
        ({"cache_dir": __file__}, __file__),
        ({"dest": ""}, "''"),
        ({"dest": b"out"}, "b'out'"),
        ({"dest": "nul\0byte"}, "nul"),
        ({"dest": "half\ud800character"}, "half"),
        ({"dest": f"{__file__}/inside"}, f"{__file__}/inside"),
        ({"dest": "."}, "current directory"),
        ({"dest": ".."}, "current directory"),
        ({"dest": "/"}, ": /."),
        ({"dest": "here"}, "link"),
        ({"dest": "link"}, "link"),
        ({"dest": "loop"}, "loop"),
        ({"dest": "long" * 64}, "longlong"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_read_or_requested(
    directory, tmp_path, monkeypatch, gcs_server, arguments, fact
):
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (here / "link").symlink_to(tmp_path / "empty")
    (here / "loop").symlink_to("loop")
    (here / "here").symlink_to(here)
    monkeypatch.chdir(here)
    gcs_server.clear_requests()
    with pytest.raises(InvalidInputError, match=re.escape(fact)):
        materialize(directory, progress=lambda _: pytest.fail("read"), **arguments)
    assert gcs_server.requests == []
    assert sorted(os.listdir(here)) == ["file", "here", "link", "loop"]


def test_directory_one_is_in_is_reused_if_it_is_the_dataset(directory, tmp_path, monkeypatch):
    dest = materialize(directory, tmp_path / "out", replace=True)
    monkeypatch.chdir(f"{dest}/sub")
    assert materialize(directory, dest) == dest
    assert materialize(directory, "..") == dest


@pytest.mark.parametrize("is_dir", [True, False])
def test_failed_download_leaves_nothing_in_the_cache(directory, single, bucket, tmp_path, is_dir):
    ref = directory if is_dir else single
    name = "train.csv" if is_dir else "config.json"
    put(bucket, {f"{ref['gcs_uri'].split('/', 3)[3]}/{name}": b"T"})
    (tmp_path / "cache").mkdir()
    for _ in range(2):
        with pytest.raises(IntegrityError):
            materialize(ref, cache_dir=tmp_path / "cache")
        assert os.listdir(tmp_path / "cache") == []


def test_cache_dir_that_cannot_be_made_is_named_as_such(directory, tmp_path, monkeypatch):
    def makedirs(path, **_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)  # as in /proc

    monkeypatch.setattr(os, "makedirs", makedirs)
    with pytest.raises(OSError, match=f"cache_dir.*No such file.*{tmp_path}/x") as caught:
        materialize(directory, cache_dir=tmp_path / "x")
    assert caught.value.errno == errno.ENOENT
    for word in ("Errno", "dest"):
        assert word not in str(caught.value)


# A URI instead of a ref.


@pytest.mark.parametrize("slash", ["", "/"])
def test_marker_tells_what_a_uri_is(directory, single, tmp_path, slash):
    whole = materialize(directory["gcs_uri"] + slash, tmp_path / "out")
    assert on_disk(pathlib.Path(whole)) == WANTED
    assert materialize(single["gcs_uri"] + slash, tmp_path) == str(tmp_path / "config.json")


def test_uri_alone_is_enough_for_a_copy_in_the_cache(directory, tmp_path):
    path = materialize(directory["gcs_uri"], cache_dir=tmp_path)
    assert path == materialize(directory, cache_dir=tmp_path)


def test_objects_tell_what_a_uri_is_where_the_marker_is_empty(
    gcs_server, gcs_bucket, tmp_path, directory, single
):
    for ref in (directory, single):
        [name] = [
            n
            for n in gcs_server.objects(gcs_bucket)
            if "marker" in n and ref["gcs_uri"].rpartition("/")[2] in n
        ]
        gcs_server.put(gcs_bucket, name, b"")
    assert on_disk(pathlib.Path(materialize(directory["gcs_uri"], tmp_path / "out"))) == WANTED
    with pytest.raises(InvalidInputError, match=single["gcs_uri"]):
        materialize(single["gcs_uri"], tmp_path / "one")


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("gs://test-bucket/raw/", InvalidInputError),
        ("gs://test-bucket/default/data-cache/", InvalidInputError),
        ("gs://test-bucket/default/data-cache/" + "0" * 63, InvalidInputError),
        ("gs://test-bucket/default/data-cache/" + "0" * 64 + "/train.csv", InvalidInputError),
        ("gs://test-bucket/default/data-cache/" + "0" * 64, IntegrityError),
    ],
)
def test_uri_that_is_no_dataset_is_said_so(gcs_server, tmp_path, uri, error):
    gcs_server.clear_requests()
    with pytest.raises(error, match=uri):
        materialize(uri, tmp_path / "out")
    assert not gcs_server.requests or error is IntegrityError
    assert os.listdir(tmp_path) == []


def test_file_of_that_name_with_other_bytes_is_refused_and_untouched(single, tmp_path):
    dest = tmp_path / "out"
    dest.mkdir()
    (dest / "config.json").write_text("mine")
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        materialize(single, str(dest))
    assert on_disk(dest) == {"config.json": b"mine"}


def test_file_that_appears_during_the_download_is_never_overwritten(single, tmp_path):
    final = tmp_path / "out" / "config.json"

    def appears(content):
        return lambda update: update.activity == "Hashing" and final.write_text(content)

    assert materialize(single, str(final.parent), progress=appears('{"a":1}')) == str(final)
    final.unlink()
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        materialize(single, str(final.parent), progress=appears("precious"))
    assert on_disk(final.parent) == {"config.json": b"precious"}


def test_file_is_put_in_place_where_there_are_no_hard_links(single, tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    dest = tmp_path / "out"
    materialize(single, str(dest))
    assert on_disk(dest) == {"config.json": b'{"a":1}'}


def test_directory_of_that_name_is_refused_before_anything_is_fetched(single, tmp_path, gcs_server):
    dest = tmp_path / "out"
    (dest / "config.json").mkdir(parents=True)
    gcs_server.clear_requests()
    with pytest.raises(InvalidInputError, match=str(dest / "config.json")):
        materialize(single, str(dest))
    assert not any("media" in str(request.query) for request in gcs_server.requests)
    assert os.listdir(dest) == ["config.json"]


def test_unreadable_marker_does_not_hide_what_is_wrong(directory, tmp_path, gcs_server, gcs_bucket):
    markers = [n for n in gcs_server.objects(gcs_bucket) if "marker" in n]
    for name in markers:
        gcs_server.put(gcs_bucket, name, b'{"format_version": 99}')
    dest = tmp_path / "out"
    dest.mkdir()
    (dest / "mine").touch()
    with pytest.raises(InvalidInputError, match=r"\bmine\b"):
        materialize(directory, str(dest))


def test_unreadable_marker_does_not_keep_the_data_from_being_downloaded(
    tree, gcs_bucket, gcs_server, tmp_path
):
    uri = upload(gcs_bucket, tree(dict.fromkeys("abcde", "1234"))).gcs_uri
    gcs_server.put(gcs_bucket, f"{uri.removeprefix(f'gs://{gcs_bucket}/')}/.cache_marker", b"{")
    assert materialize(make_data_ref(uri, True), str(tmp_path / "whole"))
    (tmp_path / "folder").mkdir()
    with open_bucket(gcs_bucket) as store:  # more than a batch: the marker is asked for the total
        download(RemoteData(store, DataRef(uri, True)), str(tmp_path / "folder"), batch_objects=2)
    assert on_disk(tmp_path / "folder") == on_disk(tmp_path / "whole")


def test_file_joins_what_else_is_in_the_destination(single, tmp_path):
    dest = tmp_path / "out"
    dest.mkdir()
    (dest / "neighbour").write_text("mine")
    materialize(single, str(dest))
    assert on_disk(dest) == {"config.json": b'{"a":1}', "neighbour": b"mine"}


def test_file_in_the_destinations_place_is_an_error_and_stays(directory, single, tmp_path):
    (tmp_path / "out").write_text("mine")
    for ref in (directory, single):
        with pytest.raises((InvalidInputError, OSError), match="out"):
            materialize(ref, str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_link_in_the_destinations_place_is_never_followed_to_overwrite(directory, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "mine")
    with pytest.raises(InvalidInputError):
        materialize(directory, str(tmp_path / "out"))
    assert on_disk(tmp_path / "mine") == {}


@pytest.mark.parametrize("is_dir", [True, False])
def test_no_marker_ever_reaches_the_disk(directory, single, tmp_path, is_dir):
    materialize(directory if is_dir else single, str(tmp_path / "out"))
    assert list((tmp_path / "out").rglob(".cache_marker")) == []


def test_file_named_like_the_marker_below_the_top_is_data(tree, gcs_bucket, tmp_path, layout):
    result = upload(gcs_bucket, str(tree({"sub/.cache_marker": "mine"})), layout=layout)
    materialize(make_data_ref(result.gcs_uri, True), str(tmp_path / "out"))
    assert on_disk(tmp_path / "out") == {"sub/.cache_marker": b"mine"}


def test_empty_directory_comes_back_empty(tree, gcs_bucket, tmp_path, layout):
    result = upload(gcs_bucket, str(tree({})), layout=layout)
    materialize(make_data_ref(result.gcs_uri, True), str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


def test_dataset_under_both_layouts_is_the_same_dataset(tree, gcs_bucket, tmp_path):
    root = tree(FILES)
    for layout in get_args(LayoutName):
        for path in (root, root / "train.csv"):
            upload(gcs_bucket, str(path), layout=layout)
    for layout in get_args(LayoutName):
        for path, is_dir in ((root, True), (root / "train.csv", False)):
            uri = upload(gcs_bucket, str(path), layout=layout).gcs_uri
            ref = DataRef(uri, is_dir, None, get_layout(layout)).to_dict()
            got = materialize(ref, str(tmp_path / f"{layout}-{is_dir}"))
            assert os.path.isdir(got) is is_dir


@needs_flock
def test_leftovers_of_a_killed_attempt_are_swept(directory, single, tmp_path):
    for partial in (partial_name("out"), f"one/{partial_name('config.json')}"):
        (tmp_path / partial / "sub").mkdir(parents=True)
        (tmp_path / partial / "train.csv").write_text("half")
        (tmp_path / partial / "sub" / "junk").write_text("junk")
        (tmp_path / partial / "link").symlink_to(tmp_path)
    materialize(directory, str(tmp_path / "out"))
    materialize(single, str(tmp_path / "one"))
    assert on_disk(tmp_path / "out") == WANTED
    assert os.listdir(tmp_path / "one") == ["config.json"]
    assert sorted(os.listdir(tmp_path)) == ["data", "one", "out", "single"]


def test_result_has_ordinary_permissions(directory, tmp_path):
    before = os.umask(0o027)
    try:
        materialize(directory, str(tmp_path / "out"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / "train.csv").stat().st_mode) == 0o640


# Data outside a cache.


def put(bucket, files):
    for name, content in files.items():
        bucket.blob(name).upload_from_string(content)


@pytest.mark.parametrize("slash", ["", "/"])
def test_plain_prefix_becomes_a_directory(bucket, tmp_path, slash):
    put(bucket, {"raw/a": b"1", "raw/sub/b": b"2", "raw-other": b"3", "raw/": b"", "raw/c/": b""})
    path = materialize(make_data_ref(f"gs://{bucket.name}/raw{slash}", True), str(tmp_path / "out"))
    assert path == str(tmp_path / "out")
    assert on_disk(tmp_path / "out") == {"a": b"1", "sub/b": b"2"}


def test_plain_object_becomes_a_file(bucket, tmp_path):
    put(bucket, {"raw/train.csv": b"1", "raw/train.csv.bak": b"2", "raw/train.csv/x": b"3"})
    ref = make_data_ref(f"gs://{bucket.name}/raw/train.csv", False)
    assert materialize(ref, str(tmp_path)) == str(tmp_path / "train.csv")
    assert (tmp_path / "train.csv").read_bytes() == b"1"
    assert materialize(ref, str(tmp_path)) == str(tmp_path / "train.csv")


def test_plain_data_that_changed_gets_another_default_destination(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ref = make_data_ref(f"gs://{bucket.name}/raw/a", False)
    put(bucket, {"raw/a": b"1"})
    first = materialize(ref)
    assert materialize(ref) == first
    put(bucket, {"raw/a": b"2"})
    second = materialize(ref)
    with open(first, "rb") as old, open(second, "rb") as new:
        assert (old.read(), new.read()) == (b"1", b"2")


@pytest.mark.parametrize(("name", "is_dir"), [("absent", True), ("absent", False), ("raw", False)])
def test_nothing_there_is_an_error_and_leaves_nothing(bucket, tmp_path, name, is_dir):
    put(bucket, {"raw/a": b"1"})
    with pytest.raises(IntegrityError, match=f"gs://{bucket.name}/{name}"):
        materialize(make_data_ref(f"gs://{bucket.name}/{name}", is_dir), str(tmp_path / "out"))
    assert on_disk(tmp_path) == {}


# What is stored is not what the ref names.


def test_wrong_kind_in_the_ref_is_an_error_and_leaves_nothing(directory, single, tmp_path):
    before = sorted(os.listdir(tmp_path))
    for ref in (directory, single):
        ref["is_dir"] = not ref["is_dir"]
        with pytest.raises(
            (IntegrityError, InvalidInputError), match=r"gs://.* is_dir|is_dir=.*gs://"
        ):
            materialize(ref, str(tmp_path / "out"))
    assert on_disk(tmp_path / "out") == {}
    assert sorted(set(os.listdir(tmp_path)) - {"out"}) == before


TAMPERINGS = {
    "other bytes": lambda bucket, prefix: put(bucket, {f"{prefix}/train.csv": b"T"}),
    "more bytes": lambda bucket, prefix: put(bucket, {f"{prefix}/train.csv": b"tt"}),
    "an object more": lambda bucket, prefix: put(bucket, {f"{prefix}/stray": b""}),
    "an object less": lambda bucket, prefix: bucket.blob(f"{prefix}/train.csv").delete(),
    "no objects": lambda bucket, prefix: [
        blob.delete() for blob in bucket.list_blobs(prefix=prefix) if "marker" not in blob.name
    ],
}


@pytest.mark.parametrize("tamper", TAMPERINGS.values(), ids=TAMPERINGS)
def test_tampered_dataset_is_an_integrity_error_and_leaves_nothing(
    directory, bucket, tmp_path, tamper
):
    tamper(bucket, directory["gcs_uri"].removeprefix(f"gs://{bucket.name}/"))
    with pytest.raises(IntegrityError) as caught:
        materialize(directory, str(tmp_path / "out"))
    assert directory["gcs_uri"] in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["data"]


# Object names that would lead out of the destination, or that no file can have.
UNSAFE_NAMES = [
    "../escape",
    "../../escape",
    "sub/../../escape",
    "sub/..",
    "..",
    ".",
    "./x",
    "/escape",
    "//escape",
    "a//b",
    "C:/escape",
    "c:\\escape",
    "nul\0byte",
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
@pytest.mark.parametrize("prefix", ["raw", "default/data-cache/" + "a" * 64])
def test_object_name_that_leads_out_is_refused_before_it_is_fetched(
    gcs_server, gcs_bucket, tmp_path, prefix, name
):
    gcs_server.put(gcs_bucket, f"{prefix}/{name}", b"owned")
    inside = tmp_path / "deep" / "inside"
    with pytest.raises(InvalidInputError, match=re.escape(repr(name))):
        materialize(make_data_ref(f"gs://{gcs_bucket}/{prefix}", True), str(inside / "out"))
    assert on_disk(tmp_path) == {}
    assert writes(gcs_server) == []


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a/b/c/d")])
def test_name_that_is_a_file_and_a_directory_is_an_error_that_names_it(bucket, tmp_path, names):
    put(bucket, {f"raw/{name}": b"x" for name in names})
    with pytest.raises(IntegrityError, match=names[0]):
        materialize(make_data_ref(f"gs://{bucket.name}/raw", True), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_missing_bucket_is_an_error_of_its_own(gcs_bucket, tmp_path):
    for is_dir in (True, False):
        with pytest.raises(StoreError, match="no-such-bucket-here"):
            materialize(make_data_ref("gs://no-such-bucket-here/x", is_dir), str(tmp_path / "out"))
    assert on_disk(tmp_path) == {}


def test_text_that_is_no_ref_is_refused_before_a_client_is_made(monkeypatch):
    from google.cloud import storage

    monkeypatch.setattr(storage, "Client", lambda **_: pytest.fail("a client was made"))
    for text in ("gs://bucket/data", "data"):
        with pytest.raises(InvalidInputError, match=text):
            materialize(text)


def test_destination_that_is_a_file_is_refused_and_untouched(single, tmp_path):
    dest = tmp_path / "out"
    dest.write_text("mine")
    with pytest.raises(InvalidInputError, match=str(dest)):
        materialize(single, str(dest))
    assert dest.read_text() == "mine"


def test_directory_that_is_none_is_named_as_the_file_it_is(single, tmp_path):
    single["is_dir"] = True
    with pytest.raises(InvalidInputError, match=f"is_dir=True.*{single['gcs_uri']}"):
        materialize(single, str(tmp_path / "out"))


def test_file_with_the_longest_name_comes_back(tree, gcs_bucket, tmp_path):
    name = "n" * 255
    uri = upload(gcs_bucket, str(tree({name: "x"}) / name)).gcs_uri
    got = materialize(make_data_ref(uri, False), str(tmp_path / "out"))
    assert os.path.basename(got) == name


def test_prepared_empty_directory_keeps_its_mode(directory, tmp_path):
    dest = tmp_path / "out"
    dest.mkdir(mode=0o700)
    materialize(directory, str(dest))
    assert stat.S_IMODE(dest.stat().st_mode) == 0o700
    assert on_disk(dest) == WANTED


def test_current_directory_is_not_replaced(directory, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InvalidInputError, match=str(tmp_path / "here")):
        materialize(directory, ".")
    assert os.getcwd() == str(tmp_path / "here")


def test_tilde_in_the_destination_is_the_home_directory(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert materialize(directory, "~/out") == str(tmp_path / "out")


def test_link_to_an_empty_directory_is_refused_with_its_target(directory, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    with pytest.raises(InvalidInputError, match=str(tmp_path / "scratch")):
        materialize(directory, str(tmp_path / "out"))


def test_wrong_destination_is_read_once(directory, tmp_path, tree, monkeypatch):
    dest = tree({"other": "x"}, "out")
    seen = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(path) or real(path))
    with pytest.raises(InvalidInputError, match=str(dest)):
        materialize(directory, str(dest))
    assert seen.count(os.fsencode(f"{dest}/")) == 1


def test_index_of_the_environment_does_not_spare_verification(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_REMOTE_HASH_INDEX", str(tmp_path / "index"))
    materialize(directory, str(tmp_path / "out"))
    assert not (tmp_path / "index").exists()


def stored_as(snapshot, digests):
    """Return a store that holds a snapshot's files under another hash, with these digests."""
    key = CacheKey("memory-bucket", "default", "0" * 64, get_layout("keras_remote"))
    store = MemoryStore()
    for file in snapshot.records():
        with open(snapshot.local_path(file.path), "rb") as local:
            content = local.read()
        digest = digests.get(file.path, file.digest.hex())
        store.replace(key.object_name(file.path), content, digest)
    return RemoteData(store, DataRef(key.gcs_uri, True))


@pytest.mark.parametrize(
    ("digests", "named"),
    [
        ({"sub/eval.csv": "ab" * 32}, ["sub/eval.csv"]),
        ({"train.csv": None}, ["train.csv"]),
        ({"sub/eval.csv": "ab" * 32, "train.csv": None}, ["sub/eval.csv", "train.csv"]),
        (dict.fromkeys(FILES), []),  # other clients attach none
    ],
    ids=["replaced", "added", "both", "another client"],
)
def test_file_that_its_uploader_did_not_hash_is_named(tree, digests, named):
    snapshot = take_snapshot(str(tree(FILES)))
    *faults, last = stored_as(snapshot, digests).problem(snapshot).split("; ")
    assert [fault.split()[0] for fault in faults] == named
    assert snapshot.content_hash in last


class Listing(MemoryStore):
    """Shows the objects of another store, each new in memory as those from the network are."""

    def __init__(self, store: MemoryStore) -> None:
        self._shown = list(list_objects(store, ""))

    def read(self, name):
        return None

    def list_page(self, prefix, token=None):
        start = int(token or 0)
        page = [
            o._replace(digest=f"{i:064x}") for i, o in enumerate(self._shown[start : start + 100])
        ]
        return Page(page, str(start + 100) if start + 100 < len(self._shown) else None)


def test_finding_what_is_wrong_takes_little_memory_however_many_objects_there_are(tree):
    many = 3000
    snapshot = take_snapshot(str(tree({f"{number:04}": "x" for number in range(many)})))
    stored = stored_as(snapshot, {})
    source = RemoteData(Listing(stored.store), stored.ref)
    tracemalloc.start()
    problem = source.problem(snapshot)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(re.findall(r"\b\d{4}\b", problem)) == 5  # the first names
    assert peak < 150 * many
