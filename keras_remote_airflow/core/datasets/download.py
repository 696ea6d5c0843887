"""Download the objects that a ref stands for into an empty folder."""

import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice

from keras_remote_airflow.core.cloud.store import ObjectInfo, ObjectToFetch
from keras_remote_airflow.core.datasets.remote import RemoteData
from keras_remote_airflow.core.errors import IntegrityError
from keras_remote_airflow.core.layout import check_relative_paths
from keras_remote_airflow.core.progress import Progress, ProgressCallback

_log = logging.getLogger(__name__)

# Objects that are listed before they are downloaded. It bounds memory for datasets of any size.
BATCH_OBJECTS = 10_000


def download(
    source: RemoteData,
    folder: str,
    progress: ProgressCallback | None = None,
    batch_objects: int = BATCH_OBJECTS,
) -> Progress:
    """Download the objects into `folder`, which is empty; return what was downloaded.

    Raises:
        InvalidInputError: the name of an object leads out of the folder, or no file can have it.
        IntegrityError: two names cannot be files of one folder, or bytes disagree with a checksum.
    """
    made = {folder}

    def files(batch: Iterable[tuple[bytes, ObjectInfo]]) -> Iterator[ObjectToFetch]:
        for relative, info in batch:
            check_relative_paths([relative], "")
            path = os.path.join(folder, os.fsdecode(relative))
            parent = os.path.dirname(path)
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            yield ObjectToFetch(info, path)

    def done(file: ObjectToFetch) -> None:
        received.add(1, file.info.size or 0)

    objects = source.objects()
    with Progress(_log, "Downloading", source.ref.gcs_uri, progress) as received:
        while batch := list(islice(objects, batch_objects)):
            if not received.files:
                if len(batch) < batch_objects:  # the first batch is the last one, too
                    received.expect(len(batch), sum(info.size or 0 for _, info in batch))
                elif receipt := source.receipt():
                    received.expect(receipt.files, receipt.total_bytes)
            try:
                source.store.download(files(batch), done, received.move)
            except (FileExistsError, NotADirectoryError) as exc:
                # The folder was empty: two object names claim one place, as "a" and "a/b" do.
                place = os.path.relpath(exc.filename, folder)
                raise IntegrityError(
                    f"the data cannot be a directory: one object is {place}, another is below "
                    f"{place}/: {source.ref.gcs_uri}. Remove the one that does not belong there."
                ) from None
    return received
