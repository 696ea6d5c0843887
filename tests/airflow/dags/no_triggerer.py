"""Sensors that defer where no triggerer runs, so that only the scheduler can end their wait."""

from datetime import timedelta

import pendulum

from keras_remote_airflow import CacheSensor

try:
    from airflow.sdk import dag
except ImportError:  # Airflow 2
    from airflow.decorators import dag


class BriefSensor(CacheSensor):
    deferral_margin = timedelta(0)  # instead of five minutes


RETRIES = {"retries": 2, "retry_delay": pendulum.duration(seconds=0)}
ABSENT = {"content_hash": "0" * 64, "bucket_name": "test-bucket", "timeout": 0.1}


@dag(
    schedule="@once", start_date=pendulum.datetime(2024, 1, 1), catchup=False, default_args=RETRIES
)
def no_triggerer():
    BriefSensor(task_id="fails", deferrable=True, **ABSENT)
    BriefSensor(task_id="skips", deferrable=True, soft_fail=True, **ABSENT)


no_triggerer()
