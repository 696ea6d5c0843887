"""Refs: the exact dict, and every way in which text arrives that should be one."""

import json
import subprocess
import sys
from typing import Any

import pytest

from keras_remote_airflow import is_data_ref, make_data_ref
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.layout import KERAS_REMOTE, KINETIC, CacheKey
from keras_remote_airflow.core.refs import DataRef, parse_data_ref

HASH = "0123456789abcdef" * 4
URI = f"gs://bucket/default/data-cache/{HASH}"
# What keras-kinetic 0.0.4 makes.
KINETIC_REF = {
    "__data_ref__": True,
    "uri": URI,
    "is_dir": True,
    "mount_path": None,
    "fuse": False,
    "hf_trust_remote_code": False,
}


def test_ref_is_exactly_this_dict():
    assert make_data_ref(URI, True) == {
        "__data_ref__": True,
        "gcs_uri": URI,
        "is_dir": True,
        "mount_path": None,
    }
    assert make_data_ref(URI, is_dir=False, mount_path="/data") == {
        "__data_ref__": True,
        "gcs_uri": URI,
        "is_dir": False,
        "mount_path": "/data",
    }


@pytest.mark.parametrize(
    ("obj", "answer"),
    [
        (make_data_ref(URI, True), True),
        (KINETIC_REF, True),
        ({"__data_ref__": True}, True),
        ({"__data_ref__": 1}, False),
        ({"__data_ref__": "true"}, False),
        ({"__data_ref__": False}, False),
        ({"gcs_uri": URI, "is_dir": True}, False),
        ({}, False),
        ([("__data_ref__", True)], False),
        (json.dumps(make_data_ref(URI, True)), False),
        (DataRef(URI, True), False),
        (None, False),
        (True, False),
    ],
)
def test_is_data_ref(obj, answer):
    assert is_data_ref(obj) is answer


@pytest.mark.parametrize("spell", [dict, json.dumps, repr, lambda ref: f"\n {ref!r} \n".strip()])
@pytest.mark.parametrize("mount_path", [None, '/mnt/it\'s "data"', "/mnt/é"])
@pytest.mark.parametrize("is_dir", [True, False])
def test_ref_is_read_from_its_dict_its_json_and_its_repr(spell, mount_path, is_dir):
    ref = make_data_ref(URI, is_dir, mount_path)
    parsed = parse_data_ref(spell(ref))
    assert parsed == DataRef(URI, is_dir, mount_path, KERAS_REMOTE)
    assert parsed.to_dict() == ref


@pytest.mark.parametrize("spell", [dict, json.dumps, repr])
def test_kinetic_ref_that_has_only_uri_is_understood(spell):
    parsed = parse_data_ref(spell(KINETIC_REF))
    assert parsed == DataRef(URI, True, None, KINETIC)
    assert parsed.cache_key == CacheKey("bucket", "default", HASH, KINETIC)


def test_parsed_ref_is_taken_as_it_is():
    ref = DataRef(URI, True, "/data", KINETIC)
    assert parse_data_ref(ref) is ref


@pytest.mark.parametrize("uri", ["", "/data", "s3://bucket/x", "gs://", "gs://Not_A_Bucket/x"])
def test_there_is_no_parsed_ref_to_what_cloud_storage_cannot_hold(uri):
    with pytest.raises(InvalidInputError):
        DataRef(uri, True)


@pytest.mark.parametrize("uri", ["my-bucket/x", "gs://my-bucket/default/data-cache/", "s3://b/x"])
def test_a_uri_that_no_ref_can_hold_is_refused_when_the_ref_is_made(uri):
    with pytest.raises(InvalidInputError, match=uri):
        make_data_ref(uri, True)
    assert make_data_ref("{{ params.uri }}", True)["gcs_uri"] == "{{ params.uri }}"


def test_parsed_ref_knows_its_bucket_and_its_object():
    ref = DataRef("gs://bucket/raw/train.csv", False)
    assert (ref.bucket, ref.object_name) == ("bucket", "raw/train.csv")
    assert not ref.is_prefix
    assert DataRef(URI, False).is_prefix


def test_ref_of_layout_kinetic_carries_both_generations_of_keys():
    ref = DataRef(URI, True, None, KINETIC).to_dict()
    assert ref == {**KINETIC_REF, "gcs_uri": URI}
    assert parse_data_ref(ref).layout is KINETIC


def test_ref_to_data_outside_a_cache_has_no_cache_key():
    assert parse_data_ref(make_data_ref("gs://bucket/raw/", True)).cache_key is None


def _with(**fields):
    return {**make_data_ref(URI, True), **fields}


def _without(*names):
    return {k: v for k, v in make_data_ref(URI, True).items() if k not in names}


NOT_REFS = [
    None,
    "",
    " ",
    0,
    True,
    [],
    {},
    URI,
    "None",
    "null",
    "[]",
    b"{}",
    [make_data_ref(URI, True)],
    json.dumps([make_data_ref(URI, True)]),
    json.dumps(json.dumps(make_data_ref(URI, True))),
    {"gcs_uri": URI, "is_dir": True},
    _with(__data_ref__="true"),
    _with(__data_ref__=1),
    _without("gcs_uri"),
    _without("is_dir"),
    _with(gcs_uri=None),
    _with(gcs_uri=7),
    _with(gcs_uri=""),
    _with(gcs_uri="/local/path"),
    _with(gcs_uri="s3://bucket/x"),
    _with(gcs_uri="gs://"),
    _with(gcs_uri="gs:///x"),
    _with(gcs_uri="gs://Not_A_Bucket/x"),
    _with(is_dir=None),
    _with(is_dir="true"),
    _with(is_dir=1),
    _with(mount_path=7),
    _with(mount_path=["/a"]),
    {**KINETIC_REF, "uri": "hf://imdb"},
    "{{ ti.xcom_pull(task_ids='upload') }}",
    json.dumps(make_data_ref(URI, True))[:-1],
    repr(make_data_ref(URI, True)) + ";",
    "make_data_ref('gs://bucket/x', True)",
]


@pytest.mark.parametrize("value", NOT_REFS, ids=range(len(NOT_REFS)))
def test_anything_else_is_refused_and_shown(value):
    with pytest.raises(InvalidInputError) as caught:
        parse_data_ref(value)
    assert str(caught.value).strip()
    assert len(str(caught.value)) < 600


# Each would leave the file "proof" behind, if anything evaluated it.
CODE = [
    "__import__('os').system('touch proof')",
    "{'__data_ref__': True, 'gcs_uri': __import__('os').system('touch proof'), 'is_dir': True}",
    "{'__data_ref__': open('proof', 'w'), 'gcs_uri': 'gs://bucket/x', 'is_dir': True}",
    "(lambda: open('proof', 'w'))()",
    "[open('proof', 'w') for _ in [1]]",
    "f\"{open('proof', 'w')}\"",
    "{**{'__data_ref__': True}, 'x': open('proof', 'w')}",
    "!!python/object/apply:os.system ['touch proof']",
]


@pytest.mark.parametrize("text", CODE)
def test_nothing_in_a_ref_is_evaluated(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError):
        parse_data_ref(text)
    assert list(tmp_path.iterdir()) == []


# Python expressions; in a process of their own, since what they attack is the interpreter.
HOSTILE_TEXTS = [
    "'[' * 60_000",
    "'{' * 60_000",
    "'(' * 60_000",
    "'{\"a\":' * 10_000",
    "'-' * 60_000 + '1'",
    "'not ' * 16_000 + '1'",
    "'~' * 60_000 + '1'",
    "'1+' * 30_000 + '1'",
    "'1**' * 20_000 + '1'",
    "'9**9**9**9**9'",
    "'9' * 60_000",
    "'a.' * 30_000 + 'a'",
    "'[' * 30_000 + ']' * 30_000",
    "'\"a\" ' * 15_000",
    "'\\0' * 100",
    "'\\udcff'",
    "'{\"__data_ref__\": true, \"gcs_uri\": ' + '[' * 900 + ']' * 900 + '}'",
    "'x' * 50_000_000",
]


@pytest.mark.timeout(60)
def test_no_text_crashes_or_stalls_the_parser():
    script = "\n".join(
        [
            "from keras_remote_airflow.core.errors import InvalidInputError",
            "from keras_remote_airflow.core.refs import parse_data_ref",
            "import time, warnings",
            f"for expression in {HOSTILE_TEXTS!r}:",
            "    print(expression, end=': ', flush=True)",
            "    try:",
            "        parse_data_ref(eval(expression))",
            "    except InvalidInputError as exc:",
            "        print('refused', len(str(exc)) < 600)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{text}: refused True" for text in HOSTILE_TEXTS]


@pytest.mark.usefixtures("no_collection")
def test_nesting_that_no_text_could_spell_is_refused_too():
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidInputError):
        parse_data_ref(_with(gcs_uri=deep))
    # Taken apart by hand: the interpreter would recurse.
    while deep:
        deep = deep.pop()


def test_a_bare_uri_is_told_how_to_become_a_ref():
    with pytest.raises(InvalidInputError, match=r"make_data_ref\(uri, is_dir\)"):
        parse_data_ref("gs://bucket/default/data-cache/x")


@pytest.mark.parametrize("cut", ["", "/", "/" + HASH[:60], f"/{HASH}0", "/abc/"])
@pytest.mark.parametrize("is_dir", [True, False])
def test_uri_of_a_cache_without_the_whole_hash_is_refused(cut, is_dir):
    digits = len(cut.strip("/"))
    with pytest.raises(InvalidInputError, match=rf"cut short.*64.* {digits}\b.*data-cache"):
        DataRef(f"gs://bucket/team/a/data-cache{cut}", is_dir)


@pytest.mark.parametrize(
    "name", [f"default/data-cache/{HASH}/train.csv", "raw/data-cache/images/", "raw/data-cache.csv"]
)
def test_other_data_beside_or_below_a_data_cache_is_plain_data(name):
    assert DataRef(f"gs://bucket/{name}", is_dir=False).cache_key is None


def test_text_that_is_cut_short_is_told_so():
    text = json.dumps(make_data_ref(URI, is_dir=True))[:-10]
    with pytest.raises(InvalidInputError, match=rf"neither JSON nor.*\b{len(text)} characters"):
        parse_data_ref(text)


def test_ref_without_is_dir_is_told_so():
    with pytest.raises(InvalidInputError, match="is_dir is missing"):
        parse_data_ref({"__data_ref__": True, "gcs_uri": URI})
