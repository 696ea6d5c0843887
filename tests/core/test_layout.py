"""Every object name is spelled here, and every name that cannot be one is refused here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_remote_airflow.core.errors import InvalidInputError, MarkerError
from keras_remote_airflow.core.layout import (
    KERAS_REMOTE,
    KINETIC,
    MAX_OBJECT_NAME_BYTES,
    CacheKey,
    Receipt,
    cache_key_from_uri,
    check_bucket,
    check_content_hash,
    check_namespace,
    check_relative_paths,
    get_layout,
    parse_marker,
    split_gcs_uri,
)

HASH = "0123456789abcdef" * 4
KEY = CacheKey("bucket", "default", HASH)

BAD_BUCKETS = [
    "",
    "ab",
    "a" * 223,
    "gs://bucket",
    "bucket/",
    "/bucket",
    "bucket/path",
    "Bucket",
    "bucket..name",
    "..",
    "-bucket",
    "bucket\n",
    "bücket",
    "bucket?x=1",
    None,
    7,
]
BAD_NAMESPACES = [
    "",
    "/",
    "/default",
    "default/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "../default",
    "gs://bucket",
    "a\nb",
    "a\rb",
    "a\0b",
    "a\tb",
    "\udcff",
    None,
    7,
]
BAD_HASHES = [
    "",
    "abc",
    HASH.upper(),
    HASH[:-1],
    HASH + "0",
    HASH + "\n",
    " " + HASH,
    "g" * 64,
    f"{HASH}/",
    "../" + HASH[3:],
    None,
    7,
]
BAD_PATHS = [
    b"",
    b".",
    b"..",
    b"/absolute",
    b"a/",
    b"a//b",
    b"a/./b",
    b"a/../b",
    b"../a",
    b"a/..",
    b"a\nb",
    b"a\rb",
    b"a\0b",
    b"C:",
    b"C:/a",
    b"c:\\a",
]
GOOD_PATHS = ["a", "...", "..a", "a..", ".hidden", "a b", "é", "a/b/c", "CC:/a", "a:b", "a\\b"]


def test_names_of_the_default_layout():
    assert KEY.prefix == f"default/data-cache/{HASH}/"
    assert KEY.object_name("sub/a.csv") == f"default/data-cache/{HASH}/sub/a.csv"
    assert KEY.marker_name == f"default/data-cache/{HASH}/.cache_marker"
    assert KEY.gcs_uri == f"gs://bucket/default/data-cache/{HASH}"


def test_kinetic_keeps_its_marker_elsewhere_and_its_data_in_the_same_place():
    key = CacheKey("bucket", "default", HASH, KINETIC)
    assert key.marker_name == f"default/data-markers/{HASH}"
    assert (key.prefix, key.gcs_uri) == (KEY.prefix, KEY.gcs_uri)


def test_layouts_are_known_by_name():
    assert get_layout("keras_remote") is KERAS_REMOTE
    assert get_layout("kinetic") is KINETIC


@pytest.mark.parametrize("name", ["", "Kinetic", "keras-remote", None])
def test_unknown_layout_is_refused_with_the_known_ones(name):
    with pytest.raises(InvalidInputError, match=r"\['keras_remote', 'kinetic'\]"):
        get_layout(name)


@pytest.mark.parametrize("bucket", BAD_BUCKETS)
def test_bad_bucket_is_refused(bucket):
    with pytest.raises(InvalidInputError, match="invalid bucket name"):
        check_bucket(bucket)


@pytest.mark.parametrize("bucket", ["abc", "my-bucket_1", "my.example.com", "9lives"])
def test_good_bucket_is_taken(bucket):
    assert check_bucket(bucket) == bucket


@pytest.mark.parametrize("namespace", BAD_NAMESPACES)
def test_bad_namespace_is_refused(namespace):
    with pytest.raises(InvalidInputError, match="invalid namespace_prefix"):
        check_namespace(namespace)


@pytest.mark.parametrize("namespace", ["default", "team/project", "équipe", "a b", "v1.2", "..x"])
def test_good_namespace_is_taken(namespace):
    assert check_namespace(namespace) == namespace


@pytest.mark.parametrize("content_hash", BAD_HASHES)
def test_bad_content_hash_is_refused(content_hash):
    with pytest.raises(InvalidInputError, match="invalid content hash"):
        check_content_hash(content_hash)


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_relative_path_is_refused(path):
    with pytest.raises(InvalidInputError, match="unsafe relative path"):
        check_relative_paths([path], "")


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_good_relative_path_is_taken(path):
    check_relative_paths([path.encode()], KEY.prefix)


def test_object_name_may_have_1024_bytes_and_not_one_more():
    room = 1024 - len(KEY.prefix)
    check_relative_paths([b"x" * room], KEY.prefix)
    check_relative_paths(["é".encode() * (room // 2)], KEY.prefix)
    for path in (b"x" * (room + 1), "é".encode() * (room // 2 + 1)):
        with pytest.raises(InvalidInputError, match=r"object name too long.*1024"):
            check_relative_paths([path], KEY.prefix)


@pytest.mark.parametrize("layout", [KERAS_REMOTE, KINETIC], ids=lambda layout: layout.name)
def test_namespace_that_leaves_no_room_for_the_marker_is_refused(layout):
    longest = 1024 - len(CacheKey("bucket", "x", HASH, layout).marker_name) + 1
    assert len(CacheKey("bucket", "n" * longest, HASH, layout).marker_name) == 1024
    with pytest.raises(InvalidInputError, match="namespace_prefix"):
        CacheKey("bucket", "n" * (longest + 1), HASH, layout)


def test_cache_uri_spells_its_key():
    for namespace in ("default", "team/project", "data-cache"):
        key = CacheKey("bucket", namespace, HASH, KINETIC)
        assert cache_key_from_uri(key.gcs_uri, KINETIC) == key
        assert cache_key_from_uri(key.gcs_uri + "/", KINETIC) == key


@pytest.mark.parametrize(
    "uri",
    [
        "gs://bucket",
        "gs://bucket/data/",
        f"gs://bucket/data-cache/{HASH}",
        f"gs://bucket/default/data-cache/{HASH[:-1]}",
        f"gs://bucket/default/data-cache/{HASH}/train.csv",
        f"gs://bucket/default/data-markers/{HASH}",
    ],
)
def test_any_other_uri_is_no_cache_key(uri):
    assert cache_key_from_uri(uri) is None


def test_uri_is_split_into_bucket_and_name():
    assert split_gcs_uri("gs://bucket/a/b.csv") == ("bucket", "a/b.csv")
    assert split_gcs_uri("gs://bucket/") == ("bucket", "")
    assert split_gcs_uri("gs://bucket") == ("bucket", "")


@pytest.mark.parametrize(
    "uri", ["", "bucket/a", "/bucket/a", "s3://bucket/a", "gs:/bucket/a", "gs://", "gs:///a"]
)
def test_anything_else_is_no_uri(uri):
    with pytest.raises(InvalidInputError):
        split_gcs_uri(uri)


def test_receipt_survives_its_marker():
    receipt = Receipt(HASH, True, 3, 1024, "2026-01-31T12:00:00Z", "keras_remote_airflow/0.1.0")
    assert receipt.to_json() == (
        b'{"format_version": 1, "content_hash": "' + HASH.encode() + b'", "is_dir": true, '
        b'"files": 3, "created_at": "2026-01-31T12:00:00Z", '
        b'"created_by": "keras_remote_airflow/0.1.0", "bytes": 1024}'
    )
    assert parse_marker(receipt.to_json(), KEY) == receipt


def test_empty_marker_is_valid_and_says_nothing():
    assert parse_marker(b"", KEY) is None


def test_marker_may_hold_keys_from_the_future():
    receipt = Receipt.now(HASH, is_dir=False, files=1, total_bytes=2)
    assert parse_marker(receipt.to_json()[:-1] + b', "colour": "blue"}', KEY) == receipt


_FIELDS = b'"is_dir": true, "files": 1, "bytes": 1'
GARBAGE_MARKERS = [
    b" ",
    b"uploaded",
    b"null",
    b"[]",
    b"1",
    b'"text"',
    b"{}",
    b"\xff\xfe",
    b'{"format_version": 1',
    b'{"format_version": null}',
    b'{"format_version": "one"}',
    b'{"format_version": 0}',
    b'{"format_version": -1}',
    b'{"format_version": 2}',
    b'{"format_version": 99999999999999999999999}',
    b'{"format_version": Infinity}',
    b'{"format_version": NaN}',
    b'{"format_version": 1}',
    b'{"format_version": 1, "content_hash": "' + b"f" * 64 + b'", ' + _FIELDS + b"}",
    b'{"format_version": 1, "content_hash": "' + HASH.encode() + b'", "files": 1, "bytes": 1}',
    b'{"format_version": 1, "content_hash": "'
    + HASH.encode()
    + b'", "is_dir": 1, "files": 1, "bytes": 1}',
    b'{"format_version": 1, "content_hash": "'
    + HASH.encode()
    + b'", "is_dir": true, "files": true, "bytes": 1}',
    b'{"format_version": 1, "content_hash": "'
    + HASH.encode()
    + b'", "is_dir": true, "files": "1", "bytes": 1}',
    b"[" * 30_000,
    b'{"a":' * 10_000,
    b"x" * 1_000_000,
    b'{"format_version": 1, "content_hash": "'
    + HASH.encode()
    + b'", '
    + _FIELDS
    + b', "padding": "'
    + b"x" * 70_000
    + b'"}',
]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("body", GARBAGE_MARKERS, ids=range(len(GARBAGE_MARKERS)))
def test_garbage_marker_is_an_error_that_names_it_and_stays_short(body):
    with pytest.raises(MarkerError) as caught:
        parse_marker(body, KEY)
    assert f"gs://bucket/{KEY.marker_name}" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_marker_of_a_newer_format_tells_both_versions():
    with pytest.raises(MarkerError, match=r"format_version 2.*up to 1"):
        parse_marker(b'{"format_version": 2}', KEY)


def is_safe(path: bytes) -> bool:
    """Whether a relative path is safe, said plainly."""
    components = path.split(b"/")
    drive = components[0][:1].isalpha() and components[0][1:2] == b":"
    return (
        not {b"", b".", b".."} & set(components)
        and not any(character in path for character in (b"\0", b"\r", b"\n"))
        and not (drive and components[0][2:3] in (b"", b"\\"))
    )


@given(st.lists(st.text(" .:/\\\0\r\na\u00e9", max_size=4), max_size=6))
def test_paths_are_refused_if_and_only_if_one_of_them_is_unsafe(paths):
    names = [path.encode() for path in paths]
    unsafe = [name for name in names if not is_safe(name)]
    if not unsafe:
        check_relative_paths(names, KEY.prefix)
        return
    with pytest.raises(InvalidInputError, match="unsafe relative path") as caught:
        check_relative_paths(names, KEY.prefix)
    assert repr(unsafe[0].decode()) in str(caught.value)


def test_the_one_path_among_many_that_is_too_long_is_named():
    paths = [b"a/b.csv", b"x" * (MAX_OBJECT_NAME_BYTES - 1), b".hidden"]
    with pytest.raises(InvalidInputError, match=r"object name too long.*/xxx"):
        check_relative_paths(paths, KEY.prefix)
