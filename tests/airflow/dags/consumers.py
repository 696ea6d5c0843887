"""Every hand-over of `consumers`, through the real operators up to the request they would send.

Only what talks to a cluster or to Vertex AI is replaced: the final pod or request is pushed as the
XCom "sent" instead.
"""

import json
import os
from types import SimpleNamespace

import pendulum
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.google.cloud.hooks.vertex_ai.custom_job import CustomJobHook
from airflow.providers.google.cloud.operators.kubernetes_engine import GKEStartPodOperator
from airflow.providers.google.cloud.operators.vertex_ai import custom_job as vertex
from google.cloud.aiplatform_v1 import PipelineServiceClient
from google.cloud.aiplatform_v1.types import CreateCustomJobRequest, CreateTrainingPipelineRequest
from kubernetes.client import ApiClient

from keras_remote_airflow import DataUploadOperator
from keras_remote_airflow.consumers import (
    gcsfuse_pod_kwargs,
    materialize_pod_kwargs,
    vertex_command_kwargs,
    vertex_custom_job_kwargs,
)

try:
    from airflow.sdk import dag, get_current_context, task, task_group
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task, task_group
    from airflow.operators.python import get_current_context

DATA = os.environ["TEST_DATA"]
FILE = os.path.join(DATA, "train.csv")


def push_pod(self, context):
    pod = ApiClient().sanitize_for_serialization(self.build_pod_request_obj(context))
    context["ti"].xcom_push(key="sent", value=pod)


class RequestSentError(Exception):
    """Nothing more to see: the request has been recorded."""


def push_request(type_):
    def push(*_, **call):
        request = call.pop("request", None) or {
            name: call[name] for name in call if name in type_.meta.fields
        }
        message = json.loads(type_.to_json(type_(request), including_default_value_fields=False))
        get_current_context()["ti"].xcom_push(key="sent", value=message)
        raise RequestSentError

    return push


KubernetesPodOperator.execute = push_pod
for operator in (KubernetesPodOperator, GKEStartPodOperator):
    operator.hook = SimpleNamespace(is_in_cluster=False)
CustomJobHook.get_job_service_client = lambda *_, **__: SimpleNamespace(
    create_custom_job=push_request(CreateCustomJobRequest)
)
PipelineServiceClient.create_training_pipeline = push_request(CreateTrainingPipelineRequest)

POD = {"name": "train", "namespace": "ml", "image": "trainer:1"}
GKE = {**POD, "project_id": "p", "location": "europe-west4", "cluster_name": "c"}
VERTEX = {"project_id": "p", "region": "europe-west4"}
CONTAINER_JOB = {
    **VERTEX,
    "display_name": "train",
    "container_uri": "trainer:1",
    "staging_bucket": "gs://staging",
    "args": ["--epochs", "3"],
}
CUSTOM_JOB = {
    "display_name": "train {{ params.epochs }}",
    "job_spec": {
        "worker_pool_specs": [
            {
                "machine_spec": {"machine_type": "n1-standard-4"},
                "replica_count": 1,
                "container_spec": {
                    "image_uri": "trainer:1",
                    "command": ["python", "train.py"],
                    "env": [{"name": "EPOCHS", "value": "{{ params.epochs }}"}],
                },
            }
        ]
    },
}


@task
def a_ref(gcs_uri, is_dir):
    return {"__data_ref__": True, "gcs_uri": gcs_uri, "is_dir": is_dir, "mount_path": "/raw"}


@task_group
def fold(path):
    upload = DataUploadOperator(task_id="upload", data=path, bucket_name="test-bucket")
    KubernetesPodOperator(task_id="pod", **POD, **gcsfuse_pod_kwargs(upload, "/data"))


@dag(
    schedule=None,
    start_date=pendulum.datetime(2024, 1, 1),
    catchup=False,
    params={"epochs": "3"},
)
def consumers():
    upload = DataUploadOperator(
        task_id="upload",
        data=DATA,
        bucket_name="test-bucket",
        namespace_prefix="team/a",
        mount_path="/from/ref",
    )
    file = DataUploadOperator(task_id="file", data=FILE, bucket_name="test-bucket")
    kinetic = DataUploadOperator(
        task_id="kinetic", data=DATA, bucket_name="test-bucket", layout="kinetic"
    )

    KubernetesPodOperator(
        task_id="fuse",
        **POD,
        arguments=["--epochs", "{{ params.epochs }}"],
        env_vars={"EPOCHS": "{{ params.epochs }}"},
        annotations={"team": "a"},
        service_account_name="trainer",
        **gcsfuse_pod_kwargs(upload.output, "/data", mount_options="file-mode=444"),
    )
    GKEStartPodOperator(task_id="gke", **GKE, **gcsfuse_pod_kwargs(upload))
    KubernetesPodOperator.partial(
        task_id="mapped", **POD, **gcsfuse_pod_kwargs(upload, "/data")
    ).expand(arguments=[["a"], ["b"]])
    fold.expand(path=[DATA, FILE])

    @task.kubernetes(**POD, **gcsfuse_pod_kwargs(upload, "/data"))
    def decorated():
        return 1

    decorated()
    KubernetesPodOperator(
        task_id="init",
        **POD,
        **materialize_pod_kwargs(
            upload, "/data", image="trainer:1", container={"resources": {"limits": {"cpu": "2"}}}
        ),
    )
    GKEStartPodOperator(
        task_id="gke_init", **GKE, **materialize_pod_kwargs(upload, image="trainer:1")
    )
    if hasattr(vertex, "CreateCustomJobOperator"):  # it came with provider 22
        vertex.CreateCustomJobOperator(
            task_id="job", **VERTEX, **vertex_custom_job_kwargs(upload, CUSTOM_JOB)
        )
        vertex.CreateCustomJobOperator(
            task_id="job_verified",
            **VERTEX,
            **vertex_custom_job_kwargs(kinetic, CUSTOM_JOB, materialize_at="/data"),
        )
    vertex.CreateCustomContainerTrainingJobOperator(
        task_id="container", **CONTAINER_JOB, **vertex_command_kwargs(file, ["python", "train.py"])
    )
    vertex.CreateCustomContainerTrainingJobOperator(
        task_id="container_verified",
        **CONTAINER_JOB,
        **vertex_command_kwargs(upload, ["python", "train.py"], materialize_at="/data"),
    )

    broken = a_ref("not a URI", True)
    KubernetesPodOperator(
        task_id="fails",
        **POD,
        retries=2,
        retry_delay=pendulum.duration(seconds=0),
        **gcsfuse_pod_kwargs(broken),
    )


consumers()
