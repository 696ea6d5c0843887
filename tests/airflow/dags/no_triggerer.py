"""A sensor that defers where no triggerer runs, so that only the scheduler can end its wait."""

from datetime import timedelta

import pendulum

from keras_remote_airflow import CacheSensor

try:
    from airflow.sdk import dag
except ImportError:  # Airflow 2
    from airflow.decorators import dag


class BriefSensor(CacheSensor):
    deferral_margin = timedelta(0)  # instead of five minutes


@dag(schedule="@once", start_date=pendulum.datetime(2024, 1, 1), catchup=False)
def no_triggerer():
    BriefSensor(
        task_id="wait",
        content_hash="0" * 64,
        bucket_name="test-bucket",
        deferrable=True,
        timeout=0.1,
        retries=2,
        retry_delay=pendulum.duration(seconds=0),
    )


no_triggerer()
