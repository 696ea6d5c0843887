"""An upload of new data, and the same once more."""

import os

import pendulum

from keras_remote_airflow import DataUploadOperator

try:
    from airflow.sdk import dag
except ImportError:  # Airflow 2
    from airflow.decorators import dag


@dag(schedule=None, start_date=pendulum.datetime(2024, 1, 1), catchup=False)
def reports():
    data = {"data": os.environ["TEST_DATA"], "bucket_name": "test-bucket"}
    miss = DataUploadOperator(task_id="miss", **data)
    miss >> DataUploadOperator(task_id="hit", **data)


reports()
