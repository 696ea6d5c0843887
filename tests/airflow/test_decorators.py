"""@task.local_data: whole runs, and its parts in this process."""

import collections
import dataclasses
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from keras_remote_airflow import Data, upload_data
from keras_remote_airflow._compat import SIGTERM_RAISES, AirflowFailException
from keras_remote_airflow.core.disk.partial import partial_name
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.refs import make_data_ref, parse_data_ref
from keras_remote_airflow.decorators import LocalDataOperator, PathsForRefs, local_data_task

DAGS = Path(__file__).parent / "dags"
REF = make_data_ref("gs://test-bucket/default/data-cache/" + "a" * 64, True)
OTHER = make_data_ref("gs://test-bucket/default/data-cache/" + "b" * 64, False)


@pytest.fixture
def paths():
    fetched = []

    def fetch(ref):
        fetched.append(ref)
        return f"/local/{ref.gcs_uri[-1]}"

    paths = PathsForRefs(fetch)
    paths.fetched = fetched  # type: ignore[attr-defined]
    return paths


class Split(NamedTuple):
    train: object
    eval: object


@dataclasses.dataclass(frozen=True)
class Config:
    data: object
    epochs: int = 3
    derived: str = dataclasses.field(init=False, default="kept")


class Opaque:
    """As attrs and pydantic make them: an object with fields, and not a dataclass."""

    def __init__(self, data):
        self.data = data

    def __repr__(self):
        return "Opaque"


class Lazy(collections.abc.Sequence):
    """As Airflow hands over what a mapped task has pushed."""

    __module__ = "airflow.sdk.execution_time.lazy_sequence"

    def __init__(self, *items):
        self.items = items

    def __repr__(self):
        return f"Lazy{self.items}"  # names the test: pytest-xdist wants it alike in all processes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return dict(self.items[index])  # fetched anew each time


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (REF, "/local/a"),
        ([REF, 1], ["/local/a", 1]),
        ((REF, 1), ("/local/a", 1)),
        ({"x": {"y": [REF]}}, {"x": {"y": ["/local/a"]}}),
        (Split(REF, OTHER), Split("/local/a", "/local/b")),
        (Config(REF), Config("/local/a")),
        (collections.OrderedDict(x=REF), collections.OrderedDict(x="/local/a")),
        (
            collections.defaultdict[str, Any](list, {"x": REF}),
            collections.defaultdict[str, Any](list, {"x": "/local/a"}),
        ),
        (Lazy(REF, OTHER), ["/local/a", "/local/b"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refs_become_paths_and_types_stay(paths, value, expected):
    found = paths.put_into(value)
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(expected, collections.defaultdict):
        assert found.default_factory is list


@pytest.mark.parametrize(
    "value",
    [
        None,
        "gs://test-bucket/a",
        b"bytes",
        {"a": [1, (2, {3})]},
        Split(1, 2),
        Config("x"),
        Config,
        range(3),
        Lazy({"no": "ref"}),
        {"__data_ref__": "no"},
        json.dumps(REF),
        repr(REF),
        [json.dumps(REF)],
        Opaque(REF),
    ],
    ids=repr,
)
def test_what_holds_no_ref_that_is_looked_for_is_the_very_same_object(paths, value):
    assert paths.put_into(value) is value
    assert paths.fetched == []


@pytest.mark.parametrize(
    ("text", "what"),
    [(json.dumps(REF), "a data ref"), (repr(REF), "a data ref"), (REF["gcs_uri"], "URI of a data")],
    ids=["json", "repr", "uri"],
)
def test_one_warning_says_what_to_pass_instead_of_text(paths, caplog, text, what):
    assert paths.put_into(["gs://bucket/raw/", [text, text], {"x": text}])
    paths.warn_of_text()
    (record,) = caplog.records
    assert what in record.message
    assert "upload.output" in record.message


def test_the_uri_of_a_dataset_that_is_passed_too_draws_no_warning(paths, caplog):
    paths.put_into({"folder": REF, "called": REF["gcs_uri"]})
    paths.warn_of_text()
    assert caplog.records == []


def test_a_container_inside_itself_is_left_as_it_is(paths):
    plain: list[Any] = [1]
    plain.append({"again": plain})
    assert paths.put_into(plain) is plain
    holds: list[Any] = [REF]
    holds.append(holds)
    found = paths.put_into(holds)
    assert found[0] == "/local/a"
    assert found[1] is holds


def test_a_long_range_is_not_unrolled(paths):
    value = {"epochs": range(10**9)}
    assert paths.put_into(value) is value


def test_what_a_killed_task_left_is_removed_by_the_next(call, uploaded, tmp_path):
    left, in_use = (tmp_path / "tmp" / partial_name(name) for name in ("left", "in use"))
    for folder in (left, in_use):
        (folder / "data").mkdir(parents=True)
    descriptor = os.open(in_use, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        found, remaining = call(task(os.listdir, uploaded))
    finally:
        os.close(descriptor)
    assert sorted(found) == ["sub", "train.csv"]
    assert remaining == [in_use]


@pytest.mark.parametrize(
    ("returned", "warnings"),
    [
        (lambda path: path, 1),
        (Path, 1),
        (lambda path: {"train": path}, 1),
        (lambda path: [path, path], 1),
        (os.listdir, 0),
        (lambda path: None, 0),
    ],
)
def test_a_path_that_is_returned_and_removed_draws_one_warning(
    call, uploaded, tmp_path, caplog, returned, warnings
):
    call(task(returned, uploaded))
    assert caplog.text.count("path into its copy") == warnings
    caplog.clear()
    call(task(returned, uploaded, cache_dir=tmp_path / "cache"))
    assert "path into its copy" not in caplog.text


def test_a_cache_keeps_what_was_used_last(call, gcs_server, tmp_path, uploaded):
    cache = tmp_path / "cache"
    (cache / ("0" * 64)).mkdir(parents=True)
    (cache / ("0" * 64) / "old").write_bytes(b"123")
    (cache / f".keras-remote-{'0' * 64}.use").touch()
    path, temporary = call(task(lambda path: path, uploaded, cache_dir=cache, cache_max_bytes=4))
    copies = [entry.name for entry in cache.iterdir() if not entry.name.startswith(".")]
    assert (copies, temporary) == ([Path(path).name], [])


def test_a_ref_that_occurs_twice_is_fetched_once(paths):
    value = {"a": REF, "b": [REF | {"mount_path": "/x"}], "c": OTHER}
    assert paths.put_into(value) == {"a": "/local/a", "b": ["/local/a"], "c": "/local/b"}
    assert paths.fetched == [parse_data_ref(REF), parse_data_ref(OTHER)]


def test_arguments_handed_in_are_not_changed(paths):
    value = {"a": [REF], "b": Config(REF)}
    paths.put_into(value)
    assert value == {"a": [REF], "b": Config(REF)}


@pytest.fixture
def uploaded(gcs_bucket, dataset):
    return make_data_ref(upload_data(gcs_bucket, Data(str(dataset))), True)


def task(function, *op_args, **arguments):
    return LocalDataOperator(
        task_id="use", python_callable=function, op_args=op_args, op_kwargs={}, **arguments
    )


@pytest.fixture
def call(execute, monkeypatch, tmp_path):
    """Run a task's execute() with a temporary directory of its own, and return that one too."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def run(operator):
        return operator.execute(
            {"ti": None, "outlet_events": {}, "outlets": [], "inlet_events": {}, "params": {}}
        ), list(temporary.iterdir())

    return run


def test_other_gcs_data_is_kept_by_generation(call, gcs_server, tmp_path):
    ref = make_data_ref("gs://test-bucket/raw/", True)
    dest = tmp_path / "dest"
    seen = []
    for content in (b"1", b"1", b"2"):
        if not seen or content == b"2":
            gcs_server.put("test-bucket", "raw/a.txt", content)
        path, temporary = call(task(lambda path: path, ref, cache_dir=str(dest)))
        assert temporary == []
        assert Path(path, "a.txt").read_bytes() == content
        seen.append(path)
    assert seen[0] == seen[1] != seen[2]


def test_the_connection_is_left_alone_without_refs(call, gcs_server):
    operator = task(lambda a: a, "no ref", gcp_conn_id="there_is_no_such_connection")
    assert call(operator) == ("no ref", [])


def test_an_unusable_cache_fails_the_task_for_good(call, uploaded, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AirflowFailException, match="cache_dir is not a directory"):
        call(task(lambda path: path, uploaded, cache_dir=str(tmp_path / "file")))


def test_constructing_it_leaves_its_arguments_alone():
    arguments = {
        "cache_dir": "~/{{ 1 }}",
        "gcp_conn_id": "{{ 2 }}",
        "impersonation_chain": ("{{ 3 }}",),
        "user_project": "{{ 4 }}",
    }
    operator = task(print, REF, **arguments)
    assert {name: getattr(operator, name) for name in arguments} == arguments
    assert set(arguments) <= set(operator.template_fields)


def test_arguments_that_it_cannot_take_name_the_task_when_the_dag_is_parsed():
    with pytest.raises(InvalidInputError, match=r"cache_dir is a list of 1.*task 'use'"):
        task(print, REF, cache_dir=["/cache"])


def test_it_can_be_imported_where_the_provider_is_not_registered():
    assert local_data_task(task).function is task


def test_runs(run_dag, gcs_server, dataset, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    dest = tmp_path / "dest"
    dest.mkdir()
    run = run_dag(
        DAGS / "local_data.py",
        "local_data",
        **gcs_server.env(),
        TEST_DATA=str(dataset),
        TEST_DEST=str(dest),
        TMPDIR=str(temporary),
    )
    states = dict(run.states)
    # On Airflow 2 a kill ends dag.test() as well, so the retry is only left scheduled.
    killed = states.pop("killed"), run.tries["killed"]
    assert killed == (("up_for_retry", 1) if SIGTERM_RAISES else ("failed", 2)), run.log
    assert states.pop("raises") == "failed", run.log
    assert states.pop("never_runs") == "failed", run.log
    assert set(states.values()) == {"success"}, run.log

    content_hash = Data(str(dataset)).content_hash()
    both = {"train.csv": "t", "sub/eval.csv": "e"}
    result = run.xcoms["nested"]["return_value"]
    given = result.pop("paths")
    assert result == {
        "read": both,
        "file": {"train.csv": "t"},
        "again": True,
        "pair": ["tuple", 1],
        "plain": {"epochs": [3, "4"]},
        "run_id": True,
    }
    assert all(Path(path).is_relative_to(temporary) for path in given), given

    assert run.xcoms["reduce"]["return_value"] == {
        "type": "list",
        "read": [both, {"train.csv": "t"}],
    }
    assert run.xcoms["mapped[0]"]["return_value"] == f"{both}!"
    assert run.xcoms["mapped[1]"]["return_value"] == "{'train.csv': 't'}!"

    assert run.tries["never_runs"] == 1, "a malformed ref stays malformed"
    assert "is_dir is not true or false" in run.log
    assert run.tries["raises"] == 1
    assert Path(run.xcoms["raises"]["path"]).is_relative_to(temporary)

    kept = str(dest / "kept" / content_hash)
    assert run.xcoms["first"]["return_value"] == kept
    assert run.xcoms["second"]["return_value"] == kept
    assert re.search(f"Reusing .*{re.escape(kept)}", run.log), run.log
    assert Data(kept).content_hash() == content_hash

    assert Path((dest / "killed").read_text()).is_relative_to(temporary)
    left = [path for path in temporary.iterdir() if path.name.startswith(".keras-remote-")]
    assert left == [], "after success, failure and a kill"
