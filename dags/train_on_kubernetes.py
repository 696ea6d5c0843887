"""Upload a dataset once, then train on it in a pod and in a Vertex AI job.

    upload >> in_a_pod
    upload >> in_a_verified_pod
    upload >> on_vertex

Three ways to hand a dataset over; docs/consumers.md says what each needs. In the container the data
is in the directory named by $KERAS_REMOTE_DATA_PATH. The Airflow variables keras_remote_bucket,
trainer_image, gke_cluster and gcp_project have no defaults.
"""

from datetime import datetime

from airflow.providers.google.cloud.operators.kubernetes_engine import GKEStartPodOperator
from airflow.providers.google.cloud.operators.vertex_ai.custom_job import (
    CreateCustomContainerTrainingJobOperator,
)

try:
    from airflow.sdk import dag
except ImportError:  # Airflow 2
    from airflow.decorators import dag

from keras_remote_airflow import DataUploadOperator
from keras_remote_airflow.consumers import (
    gcsfuse_pod_kwargs,
    materialize_pod_kwargs,
    vertex_command_kwargs,
)

REGION = "europe-west4"
IMAGE = "{{ var.value.trainer_image }}"
POD = {
    "name": "train",
    "namespace": "training",
    "service_account_name": "trainer",
    "image": IMAGE,
    "cmds": ["python", "-m", "trainer"],
    "location": REGION,
    "cluster_name": "{{ var.value.gke_cluster }}",
    "project_id": "{{ var.value.gcp_project }}",
}


@dag(
    schedule=None,
    start_date=datetime(2025, 1, 1),
    catchup=False,
    doc_md=__doc__,
    tags=["example", "keras_remote"],
)
def train_on_kubernetes():
    upload = DataUploadOperator(
        task_id="upload",
        data="{{ var.value.get('keras_remote_data_dir', '/home/airflow/gcs/data') }}/train",
        bucket_name="{{ var.value.keras_remote_bucket }}",
    )
    GKEStartPodOperator(
        task_id="in_a_pod",
        **POD,
        **gcsfuse_pod_kwargs(upload, "/data"),
    )
    GKEStartPodOperator(
        task_id="in_a_verified_pod",
        **POD,
        **materialize_pod_kwargs(upload, "/data", image=IMAGE),
    )
    CreateCustomContainerTrainingJobOperator(
        task_id="on_vertex",
        project_id="my-project",  # not templated, as is container_uri
        region=REGION,
        display_name="train",
        container_uri=f"{REGION}-docker.pkg.dev/my-project/images/trainer:latest",
        staging_bucket="gs://my-staging-bucket",
        **vertex_command_kwargs(upload, ["python", "-m", "trainer"]),
    )


train_on_kubernetes()
