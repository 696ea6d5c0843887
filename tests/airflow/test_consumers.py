"""What a training task gets: through the real operators, and run where it can be run here."""

import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pytest

from keras_remote_airflow import Data, make_data_ref, upload_data
from keras_remote_airflow._compat import BaseOperator
from keras_remote_airflow.consumers import (
    gcsfuse_pod_kwargs,
    materialize_pod_kwargs,
    vertex_command_kwargs,
    vertex_custom_job_kwargs,
)
from keras_remote_airflow.core.errors import InvalidInputError

try:
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG

DAGS = Path(__file__).parent / "dags"
PREFIX = "team/a/data-cache/" + "a" * 64
REF = make_data_ref(f"gs://test-bucket/{PREFIX}", True)
CUSTOM_JOB = {
    "display_name": "train",
    "job_spec": {
        "worker_pool_specs": [
            {"container_spec": {"image_uri": "trainer:1", "command": ["python", "train.py"]}}
        ]
    },
}


def fuse_volume(kwargs):
    (volume,) = kwargs["pod_template_dict"]["spec"]["volumes"]
    return volume["csi"]["volumeAttributes"]


def container(kwargs):
    (found,) = kwargs["pod_template_dict"]["spec"]["containers"]
    return found


def variables(spec):
    return {entry["name"]: entry["value"] for entry in spec["env"]}


def test_final_pods_and_jobs(run_dag, gcs_server, dataset):
    pytest.importorskip("airflow.providers.cncf.kubernetes", reason="dependency group `optional`")
    run = run_dag(
        DAGS / "consumers.py",
        "consumers",
        timeout=240,
        **gcs_server.env(),
        TEST_DATA=str(dataset),
    )
    failed = {task for task, state in run.states.items() if state != "success"}
    # Jobs end in an exception when their request has been recorded.
    jobs = {"job", "job_verified", "container", "container_verified"} & run.states.keys()
    assert failed == {"fails", *jobs}, run.log
    assert run.tries["fails"] == 1, "a broken ref stays broken"
    assert "not a Cloud Storage URI" in run.log
    sent = {task: values["sent"] for task, values in run.xcoms.items() if "sent" in values}
    refs = {task: values.get("return_value") for task, values in run.xcoms.items()}

    content_hash = Data(str(dataset)).content_hash()
    file_hash = Data(str(dataset / "train.csv")).content_hash()
    prefix = f"team/a/data-cache/{content_hash}"
    annotations = {"gke-gcsfuse/volumes": "true"}

    def volume(prefix, more=""):
        return {
            "name": "keras-remote-data",
            "csi": {
                "driver": "gcsfuse.csi.storage.gke.io",
                "readOnly": True,
                "volumeAttributes": {
                    "bucketName": "test-bucket",
                    "mountOptions": f"implicit-dirs,only-dir={prefix}{more}",
                },
            },
        }

    def mount(path, **more):
        return {"name": "keras-remote-data", "mountPath": path, "readOnly": True} | more

    pod = sent["fuse"]
    assert pod["metadata"]["annotations"] == annotations | {"team": "a"}
    assert pod["spec"]["volumes"] == [volume(prefix, ",file-mode=444")]
    assert pod["spec"]["serviceAccountName"] == "trainer"
    (base,) = pod["spec"]["containers"]
    assert (base["name"], base["image"], base["args"]) == ("base", "trainer:1", ["--epochs", "3"])
    assert base["volumeMounts"] == [mount("/data")]
    env = variables(base)
    assert json.loads(env.pop("KERAS_REMOTE_DATA_REF")) == refs["upload"]
    assert env == {"KERAS_REMOTE_DATA_PATH": "/data", "EPOCHS": "3"}

    (base,) = sent["gke"]["spec"]["containers"]
    assert base["volumeMounts"] == [mount("/from/ref")]
    assert variables(base)["KERAS_REMOTE_DATA_PATH"] == "/from/ref"
    for task, expected in {
        "gke": prefix,
        "mapped[0]": prefix,
        "mapped[1]": prefix,
        "decorated": prefix,
        "fold.pod[0]": f"default/data-cache/{content_hash}",
        "fold.pod[1]": f"default/data-cache/{file_hash}",
    }.items():
        assert sent[task]["metadata"]["annotations"] == annotations, task
        assert sent[task]["spec"]["volumes"] == [volume(expected)], task
    assert sent["mapped[1]"]["spec"]["containers"][0]["args"] == ["b"]

    pod = sent["init"]
    assert pod["metadata"]["annotations"] == {}
    assert pod["spec"]["volumes"] == [{"name": "keras-remote-data", "emptyDir": {}}]
    (init,) = pod["spec"]["initContainers"]
    assert json.loads(variables(init)["KERAS_REMOTE_DATA_REF"]) == refs["upload"]
    del init["env"]
    assert init == {
        "name": "keras-remote-data",
        "image": "trainer:1",
        "command": [
            "python", "-m", "keras_remote_airflow", "get", "/keras-remote/data",
        ],
        "resources": {"limits": {"cpu": "2"}},
        "volumeMounts": [{"name": "keras-remote-data", "mountPath": "/keras-remote"}],
    }  # fmt: skip
    (base,) = pod["spec"]["containers"]
    assert base["volumeMounts"] == [mount("/data", subPath="data")]
    assert variables(base)["KERAS_REMOTE_DATA_PATH"] == "/data"

    pod = sent["gke_init"]
    (init,) = pod["spec"]["initContainers"]
    assert (init["name"], init["image"]) == ("keras-remote-data", "trainer:1")
    assert init["command"][-2:] == ["get", "/keras-remote/data"]
    assert json.loads(variables(init)["KERAS_REMOTE_DATA_REF"]) == refs["upload"]
    assert pod["spec"]["volumes"] == [{"name": "keras-remote-data", "emptyDir": {}}]
    (base,) = pod["spec"]["containers"]
    assert base["volumeMounts"] == [mount("/from/ref", subPath="data")]
    assert variables(base)["KERAS_REMOTE_DATA_PATH"] == "/from/ref"

    command, args = _container_command(sent["container"])
    path = f"/gcs/test-bucket/default/data-cache/{file_hash}"
    assert command[:2] == ["env", f"KERAS_REMOTE_DATA_PATH={path}"]
    assert json.loads(command[2].removeprefix("KERAS_REMOTE_DATA_REF=")) == refs["file"]
    assert (command[3:], args) == (["python", "train.py"], ["--epochs", "3"])

    command, args = _container_command(sent["container_verified"])
    assert command[:2] == ["env", "KERAS_REMOTE_DATA_PATH=/data"]
    assert (command[3], command[-2:], args) == (
        "sh",
        ["python", "train.py"],
        ["--epochs", "3"],
    )

    if "job" in jobs:
        _check_custom_jobs(sent, refs, path=f"/gcs/test-bucket/{prefix}")


def _check_custom_jobs(sent, refs, path):
    job = sent["job"]["customJob"]
    assert job["displayName"] == "train 3"
    (pool,) = job["jobSpec"]["workerPoolSpecs"]
    assert pool["containerSpec"]["command"] == ["python", "train.py"]
    env = variables(pool["containerSpec"])
    assert json.loads(env.pop("KERAS_REMOTE_DATA_REF")) == refs["upload"]
    assert env == {"KERAS_REMOTE_DATA_PATH": path, "EPOCHS": "3"}

    (pool,) = sent["job_verified"]["customJob"]["jobSpec"]["workerPoolSpecs"]
    env = variables(pool["containerSpec"])
    assert json.loads(env.pop("KERAS_REMOTE_DATA_REF")) == refs["kinetic"]
    assert env == {"KERAS_REMOTE_DATA_PATH": "/data", "EPOCHS": "3"}
    assert pool["containerSpec"]["command"][:2] == ["sh", "-c"]
    assert pool["containerSpec"]["command"][-2:] == ["python", "train.py"]


def _container_command(request):
    (pool,) = request["trainingPipeline"]["trainingTaskInputs"]["worker_pool_specs"]
    return pool["containerSpec"]["command"], pool["containerSpec"]["args"]


@pytest.fixture
def uploaded(gcs_bucket, dataset):
    return make_data_ref(upload_data(gcs_bucket, Data(str(dataset))), True)


def start(command, **env):
    """Run a container's command here; `python` is the one that runs the tests."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.run(
        command,
        env=os.environ | {"PATH": path} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


SHOW = (
    "import os, sys; print(sorted(os.listdir(os.environ['KERAS_REMOTE_DATA_PATH'])), sys.argv[1:])"
)


def test_a_vertex_command_runs_on_verified_data(uploaded, tmp_path):
    kwargs = vertex_command_kwargs(
        uploaded, ["python", "-c", SHOW, "a b"], materialize_at=str(tmp_path / "data")
    )
    done = start([*kwargs["command"], "--epochs"])
    assert (done.returncode, done.stdout) == (0, "['sub', 'train.csv'] ['a b', '--epochs']\n"), (
        done.stderr
    )


def test_a_container_downloads_at_the_expense_of_the_project_that_pays(
    gcs_server, dataset, tmp_path
):
    gcs_server.create_bucket("paid", requester_pays=True)
    ref = make_data_ref(upload_data("paid", str(dataset), user_project="payer"), True)
    gcs_server.clear_requests()
    dest = str(tmp_path / "data")
    kwargs = vertex_command_kwargs(ref, ["true"], materialize_at=dest, user_project="payer")
    assert start(kwargs["command"]).returncode == 0
    assert {request.query["userProject"] for request in gcs_server.requests} == {"payer"}

    pod = materialize_pod_kwargs(ref, "/data", image="i", user_project="payer")
    (init,) = pod["pod_template_dict"]["spec"]["initContainers"]
    assert init["command"][-3:-1] == ["--user-project", "payer"]
    assert pod["startup_timeout_seconds"] == 3600

    options = fuse_volume(
        gcsfuse_pod_kwargs(ref, "/data", mount_options="file-mode=444", user_project="payer")
    )["mountOptions"]
    assert options.endswith(",billing-project=payer,file-mode=444")


def test_a_vertex_command_does_not_run_on_anything_else(uploaded, gcs_server, tmp_path):
    gcs_server.put("test-bucket", uploaded["gcs_uri"].split("/", 3)[3] + "/train.csv", b"x")
    kwargs = vertex_command_kwargs(
        uploaded, ["python", "-c", SHOW], materialize_at=str(tmp_path / "data")
    )
    done = start(kwargs["command"])
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not what its ref names" in done.stderr


def test_an_init_container_puts_the_data_where_the_pod_expects_it(uploaded, tmp_path):
    pod = materialize_pod_kwargs(uploaded, "/data", image="trainer:1")["pod_template_dict"]["spec"]
    (init,) = pod["initContainers"]
    command = [word.replace("/keras-remote", str(tmp_path)) for word in init["command"]]
    done = start(command, **variables(init))
    assert done.returncode == 0, done.stderr
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert sorted(os.listdir(tmp_path / mount["subPath"])) == ["sub", "train.csv"]


@pytest.mark.parametrize(
    ("gcs_uri", "is_dir", "bucket", "options"),
    [
        (REF["gcs_uri"], True, "test-bucket", f"implicit-dirs,only-dir={PREFIX}"),
        (REF["gcs_uri"], False, "test-bucket", f"implicit-dirs,only-dir={PREFIX}"),
        ("gs://other/raw/", True, "other", "implicit-dirs,only-dir=raw"),
        ("gs://other/raw/a.csv", False, "other", "implicit-dirs,only-dir=raw"),
        ("gs://other/a.csv", False, "other", "implicit-dirs"),
        ("gs://other/", True, "other", "implicit-dirs"),
    ],
)
def test_fuse_sees_the_dataset_and_nothing_beside_it(gcs_uri, is_dir, bucket, options):
    kwargs = gcsfuse_pod_kwargs(make_data_ref(gcs_uri, is_dir), "/data")
    assert fuse_volume(kwargs) == {"bucketName": bucket, "mountOptions": options}


def test_one_pod_takes_several_datasets_and_a_template_of_its_own():
    mine = {
        "pod_template_dict": {
            "metadata": {"labels": {"team": "a"}},
            "spec": {"containers": [{"name": "base", "env": [{"name": "A", "value": "1"}]}]},
        },
        "init_container_logs": "mine",
        "startup_timeout_seconds": 7200,
    }
    before = json.dumps(mine)
    one = gcsfuse_pod_kwargs(REF, "/train", name="train", add_to=mine)
    two = materialize_pod_kwargs(REF, "/eval", image="i", name="eval-1", add_to=one)
    assert json.dumps(mine) == before
    template = two["pod_template_dict"]
    assert template["metadata"] == {
        "labels": {"team": "a"},
        "annotations": {"gke-gcsfuse/volumes": "true"},
    }
    names = [volume["name"] for volume in template["spec"]["volumes"]]
    assert names == ["keras-remote-train", "keras-remote-eval-1"]
    assert list(variables(container(two))) == [
        "A",
        "KERAS_REMOTE_TRAIN_PATH",
        "KERAS_REMOTE_TRAIN_REF",
        "KERAS_REMOTE_EVAL_1_PATH",
        "KERAS_REMOTE_EVAL_1_REF",
    ]
    assert two["init_container_logs"] is True  # those of all init containers
    assert two["startup_timeout_seconds"] == 7200


def test_one_job_takes_several_datasets():
    before = json.dumps(CUSTOM_JOB)
    one = vertex_custom_job_kwargs(REF, CUSTOM_JOB, name="train")["custom_job"]
    two = vertex_custom_job_kwargs(REF, one, name="eval")["custom_job"]
    assert json.dumps(CUSTOM_JOB) == before
    (pool,) = two["job_spec"]["worker_pool_specs"]
    assert list(variables(pool["container_spec"])) == [
        "KERAS_REMOTE_TRAIN_PATH",
        "KERAS_REMOTE_TRAIN_REF",
        "KERAS_REMOTE_EVAL_PATH",
        "KERAS_REMOTE_EVAL_REF",
    ]


def test_nothing_in_a_ref_is_taken_for_a_variable():
    uri = "gs://test-bucket/$(HOME)/"
    kwargs = gcsfuse_pod_kwargs(make_data_ref(uri, True), "/data")
    assert "$$(HOME)" in variables(container(kwargs))["KERAS_REMOTE_DATA_REF"]
    command = vertex_command_kwargs(make_data_ref(uri, True), ["train"])["command"]
    assert command[1] == "KERAS_REMOTE_DATA_PATH=/gcs/test-bucket/$$(HOME)"


@pytest.mark.parametrize(
    "make",
    [
        lambda upload: gcsfuse_pod_kwargs(upload, "/data"),
        lambda upload: materialize_pod_kwargs(upload, "/data", image="i"),
        lambda upload: vertex_command_kwargs(upload, ["train"]),
        lambda upload: vertex_custom_job_kwargs(upload, CUSTOM_JOB),
    ],
)
def test_the_task_depends_on_the_upload(make):
    class Consumer(BaseOperator):
        template_fields = ("kwargs",)

        def __init__(self, kwargs, **more):
            super().__init__(**more)
            self.kwargs = kwargs

    for how in (lambda upload: upload, lambda upload: upload.output):
        with DAG("dag", schedule=None):
            given = how(BaseOperator(task_id="upload"))
            consumer = Consumer(kwargs=make(given), task_id="train")
        assert consumer.upstream_task_ids == {"upload"}
        # It goes into the serialized DAG, so every parse must give the same.
        assert str(make(given)) == str(make(given))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gcsfuse_pod_kwargs(REF, "data"), "expected an absolute path"),
        (lambda: gcsfuse_pod_kwargs(REF), "set it on the upload"),
        (lambda: gcsfuse_pod_kwargs(REF, "/d", name="Data"), "invalid name 'Data'"),
        (lambda: gcsfuse_pod_kwargs(REF, "/d", name="a" * 33), "invalid name"),
        (lambda: gcsfuse_pod_kwargs(3, "/d"), "upload is a int"),
        (lambda: gcsfuse_pod_kwargs([REF, REF], "/d"), "upload is a list of 2.*task group"),
        (lambda: gcsfuse_pod_kwargs(REF, PurePosixPath("d")), "mount_path='d'"),
        (lambda: gcsfuse_pod_kwargs("{{ ti }}", "/d"), "neither JSON nor"),
        (
            lambda: gcsfuse_pod_kwargs(REF, "/d", add_to=gcsfuse_pod_kwargs(REF, "/d")),
            "has a dataset named 'data' already",
        ),
        (
            lambda: gcsfuse_pod_kwargs(REF, "/d", add_to={"pod_template_file": "pod.yaml"}),
            "pod_template_file",
        ),
        (
            lambda: gcsfuse_pod_kwargs(make_data_ref("gs://abc/a,b/", True), "/d"),
            "separated by commas",
        ),
        (lambda: vertex_command_kwargs(REF, [], materialize_at="data"), "absolute path"),
        (lambda: vertex_command_kwargs(REF, [], user_project="p"), "pass materialize_at"),
        (
            lambda: vertex_custom_job_kwargs(REF, cast(Any, object())),
            "is a object without job_spec",
        ),
        (lambda: vertex_custom_job_kwargs(REF, {}), "is a dict without job_spec"),
        (
            lambda: vertex_custom_job_kwargs(
                REF, {"job_spec": {"worker_pool_specs": [{"replica_count": 1}]}}
            ),
            "neither a container_spec nor a python_package_spec",
        ),
        (
            lambda: vertex_custom_job_kwargs(
                REF,
                {"job_spec": {"worker_pool_specs": [{"container_spec": {"image_uri": "i"}}]}},
                materialize_at="/d",
            ),
            "names no command",
        ),
        (
            lambda: vertex_custom_job_kwargs(
                REF, vertex_custom_job_kwargs(REF, CUSTOM_JOB)["custom_job"]
            ),
            "has a dataset named 'data' already",
        ),
    ],
)
def test_what_cannot_work_is_said_when_the_dag_is_parsed(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()
