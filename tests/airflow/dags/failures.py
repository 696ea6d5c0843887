"""Tasks that must not succeed, and must not be retried in vain."""

import os

import pendulum

from keras_remote_airflow import CacheSensor, DataUploadOperator

try:
    from airflow.sdk import dag
except ImportError:  # Airflow 2
    from airflow.decorators import dag

BUCKET = "test-bucket"
ABSENT = "0" * 64
RETRIES = {"retries": 2, "retry_delay": pendulum.duration(seconds=0)}
BRIEF = {"content_hash": ABSENT, "bucket_name": BUCKET, "timeout": 0.5, "poke_interval": 0.1}


@dag(schedule=None, start_date=pendulum.datetime(2024, 1, 1), catchup=False, default_args=RETRIES)
def failures():
    DataUploadOperator(task_id="no_data", data="/no/such/data", bucket_name=BUCKET)
    DataUploadOperator(task_id="bad_bucket", data=os.environ["TEST_DATA"], bucket_name="gs://b")
    DataUploadOperator(task_id="no_bucket", data=os.environ["TEST_DATA"], bucket_name="not-there")

    CacheSensor(task_id="bad_hash", content_hash="abc", bucket_name=BUCKET)
    CacheSensor(task_id="bad_hash_skips", content_hash="abc", bucket_name=BUCKET, soft_fail=True)
    CacheSensor(
        task_id="bad_hash_deferrable_skips",
        content_hash="abc",
        bucket_name=BUCKET,
        soft_fail=True,
        deferrable=True,
    )
    CacheSensor(task_id="rendered_to_none", data_ref="{{ ti.xcom_pull(task_ids='no_data') }}")
    CacheSensor(
        task_id="says_no_is_dir",
        content_hash=os.environ["TEST_EMPTY_MARKER"],
        bucket_name=BUCKET,
        layout="kinetic",
        deferrable=True,
    )

    CacheSensor(task_id="poke_times_out", **BRIEF)
    CacheSensor(task_id="reschedule_times_out", mode="reschedule", **BRIEF)
    CacheSensor(task_id="deferred_times_out", deferrable=True, **BRIEF)
    CacheSensor(task_id="poke_times_out_softly", soft_fail=True, **BRIEF)
    CacheSensor(task_id="deferred_times_out_softly", soft_fail=True, deferrable=True, **BRIEF)
    CacheSensor(task_id="deferred_never_fails", never_fail=True, deferrable=True, **BRIEF)


failures()
