"""One upload, every way to wait for it, and the tasks that use the refs."""

import os

import pendulum

from keras_remote_airflow import CacheSensor, DataUploadOperator

try:
    from airflow.sdk import dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task

BUCKET = "test-bucket"
DATA = os.environ["TEST_DATA"]
LATE_DATA = os.environ["TEST_LATE_DATA"]
CONTENT_HASH = os.environ["TEST_CONTENT_HASH"]

WAITS = {"poke_interval": 0.1, "timeout": 60, "mount_path": "/data"}


@dag(schedule=None, start_date=pendulum.datetime(2024, 1, 1), catchup=False)
def journeys():
    miss = DataUploadOperator(
        task_id="miss", data=DATA, bucket_name=BUCKET, mount_path="/{{ 'data' }}"
    )
    hit = DataUploadOperator(
        task_id="hit", data="{{ '" + DATA + "' }}", bucket_name="{{ 'test-bucket' }}"
    )
    kinetic = DataUploadOperator(task_id="kinetic", data=DATA, bucket_name=BUCKET, layout="kinetic")
    gcs = DataUploadOperator(task_id="gcs", data="gs://elsewhere/train/", bucket_name=BUCKET)
    late = DataUploadOperator(
        task_id="late", data=LATE_DATA, bucket_name=BUCKET, mount_path="/data"
    )

    # The server hides `late` from the first look of each of these.
    poke = CacheSensor(task_id="poke", data_ref=late.output, **WAITS)
    reschedule = CacheSensor(task_id="reschedule", data_ref=late.output, mode="reschedule", **WAITS)
    deferred = CacheSensor(
        task_id="deferred",
        data_ref=late.output,
        deferrable=True,
        gcp_conn_id="in_the_database",
        **WAITS,
    )

    by_hash = CacheSensor(task_id="by_hash", content_hash=CONTENT_HASH, bucket_name=BUCKET, **WAITS)
    by_data = CacheSensor(
        task_id="by_data", data=DATA, bucket_name=BUCKET, deferrable=True, **WAITS
    )
    by_repr = CacheSensor(task_id="by_repr", data_ref="{{ ti.xcom_pull(task_ids='miss') }}")
    by_json = CacheSensor(
        task_id="by_json", data_ref="{{ ti.xcom_pull(task_ids='miss') | tojson }}", deferrable=True
    )
    by_kinetic = CacheSensor(task_id="by_kinetic", data_ref=kinetic.output, deferrable=True)

    @task
    def use(gcs_uri, ref, waited):
        return {"gcs_uri": gcs_uri, "ref": ref, "waited": waited}

    use(miss.output["gcs_uri"], miss.output, poke.output["is_dir"])
    miss >> kinetic
    miss >> hit >> [by_hash, by_data, by_repr, by_json]
    poke >> reschedule >> deferred  # one after the other, as the server's faults are
    late >> gcs
    by_kinetic  # noqa: B018 - depends on kinetic through its output


journeys()
