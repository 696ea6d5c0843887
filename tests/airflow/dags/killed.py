"""An upload that is sent SIGTERM in its middle: the file in TEST_GO says when."""

import os
import signal
import threading
import time
from pathlib import Path

import pendulum

from keras_remote_airflow import DataUploadOperator

try:
    from airflow.sdk import dag
except ImportError:  # Airflow 2
    from airflow.decorators import dag

GO = Path(os.environ["TEST_GO"])


def kill_when_told(context):
    def wait_and_kill():
        while not GO.exists():
            time.sleep(0.05)
        GO.unlink()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_and_kill, daemon=True).start()


@dag(schedule=None, start_date=pendulum.datetime(2024, 1, 1), catchup=False)
def killed():
    DataUploadOperator(
        task_id="upload",
        data=os.environ["TEST_DATA"],
        bucket_name="test-bucket",
        retries=1,
        retry_delay=pendulum.duration(seconds=0),
        on_execute_callback=kill_when_told,
    )


killed()
