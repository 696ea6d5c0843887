"""What DataUploadOperator counts through Airflow's metrics, StatsD or OpenTelemetry.

    keras_remote.upload.hits       counter: uploads that found their data published
    keras_remote.upload.misses     counter: uploads that published it
    keras_remote.upload.files      counter: files sent
    keras_remote.upload.bytes      counter: bytes sent
    keras_remote.upload.duration   timer, milliseconds: hashing and sending

Each has the tags `dag_id` and `task_id`, where the backend knows tags. Uploads that failed are not
counted, nor is data that was given as a `gs://` URI.
"""

from datetime import timedelta
from typing import TYPE_CHECKING

from keras_remote_airflow._compat import Stats

if TYPE_CHECKING:
    from keras_remote_airflow.core.datasets.upload import UploadResult

_PREFIX = "keras_remote.upload"


def count_upload(result: "UploadResult", tags: dict[str, str]) -> None:
    """Send the metrics of one finished upload.

    Args:
        result: what it did.
        tags: names of the DAG and the task.
    """
    if result.content_hash is None:
        return
    Stats.incr(f"{_PREFIX}.hits" if result.cache_hit else f"{_PREFIX}.misses", tags=tags)
    Stats.incr(f"{_PREFIX}.files", result.uploaded_files, tags=tags)
    Stats.incr(f"{_PREFIX}.bytes", result.uploaded_bytes, tags=tags)
    Stats.timing(f"{_PREFIX}.duration", timedelta(seconds=result.seconds), tags=tags)
