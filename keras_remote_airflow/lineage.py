"""Describes an upload to OpenLineage: local path, object prefix, and content hash as version.

Airflow's OpenLineage provider is needed only here, and this module is imported only when that
provider asks.
"""

from typing import TYPE_CHECKING, Any

from keras_remote_airflow._compat import make_operator_lineage
from keras_remote_airflow.core.layout import split_gcs_uri

if TYPE_CHECKING:
    from keras_remote_airflow.core.datasets.upload import UploadResult


def describe_upload(path: str, result: "UploadResult | None") -> Any:
    """Return the OperatorLineage of an upload; an empty one if it did nothing or did not finish.

    The names are those of https://openlineage.io/docs/spec/naming: a local path in the namespace
    "file", an object prefix in the namespace "gs://bucket". The content hash is the version of
    both: equal versions are equal bytes.

    Args:
        path: the absolute local path of the data.
        result: what the upload did.
    """
    if result is None or result.content_hash is None:
        return make_operator_lineage()

    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.facet_v2 import DatasetFacet
    from openlineage.client.facet_v2 import dataset_version_dataset as versions
    from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

    bucket, prefix = split_gcs_uri(result.gcs_uri)
    facets: dict[str, DatasetFacet] = {
        "version": versions.DatasetVersionDatasetFacet(result.content_hash)
    }
    written = statistics.OutputStatisticsOutputDatasetFacet(
        size=result.uploaded_bytes, fileCount=result.uploaded_files
    )
    return make_operator_lineage(
        inputs=[InputDataset("file", path, facets=facets)],
        outputs=[
            OutputDataset(
                f"gs://{bucket}",
                prefix,
                facets=facets,
                outputFacets={"outputStatistics": written},
            )
        ],
    )
