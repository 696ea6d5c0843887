"""What OpenLineage receives, in the classes of its own provider."""

from types import SimpleNamespace

import pytest

from keras_remote_airflow import DataUploadOperator

GOLDEN = "15d41417b45aa09c0450d8955b845bb278f2990728bcc5d919d62309a2c6ebee"


@pytest.fixture
def extract():
    """`extract(task)` asks as the provider's listener does when a task is complete."""
    from airflow.providers.openlineage.extractors.base import DefaultExtractor

    finished = SimpleNamespace(state="success")  # early versions look
    return lambda task: DefaultExtractor(task).extract_on_complete(finished)


def test_the_path_is_the_input_and_the_prefix_the_output(execute, extract, dataset):
    task = DataUploadOperator(task_id="upload", data=str(dataset), bucket_name="test-bucket")
    execute(task)

    lineage = extract(task)

    (read,), (written,) = lineage.inputs, lineage.outputs
    assert (read.namespace, read.name) == ("file", str(dataset))
    assert (written.namespace, written.name) == (
        "gs://test-bucket",
        f"default/data-cache/{GOLDEN}",
    )
    for found in (read, written):
        assert found.facets["version"].datasetVersion == GOLDEN
    statistics = written.outputFacets["outputStatistics"]
    assert (statistics.fileCount, statistics.size) == (2, 2)


def test_a_hit_has_written_nothing(execute, extract, dataset):
    task = DataUploadOperator(task_id="upload", data=str(dataset), bucket_name="test-bucket")
    execute(task)
    execute(task)
    assert extract(task).outputs[0].outputFacets["outputStatistics"].size == 0


def test_data_that_was_on_cloud_storage_has_no_lineage(execute, extract, gcs_server):
    gcs_server.put("test-bucket", "raw/a", b"1")
    task = DataUploadOperator(
        task_id="upload", data="gs://test-bucket/raw/", bucket_name="test-bucket"
    )
    execute(task)
    lineage = extract(task)
    assert (lineage.inputs, lineage.outputs) == ([], [])


def test_a_task_that_did_not_upload_has_no_lineage(extract, dataset):
    task = DataUploadOperator(task_id="upload", data=str(dataset), bucket_name="test-bucket")
    lineage = extract(task)
    assert (lineage.inputs, lineage.outputs) == ([], [])
