"""The local server with one route more: the XML API's `PUT /bucket/object`, for obstore.

`python -m keras_remote_airflow.testing` speaks the JSON API alone, as all other contenders do.
Here such a PUT is read as the JSON API's media upload, and its answer gets the headers that the
XML API promises (https://cloud.google.com/storage/docs/xml-api/put-object-upload).
"""

import sys
from collections.abc import Callable
from urllib.parse import unquote

from keras_remote_airflow.testing import server
from keras_remote_airflow.testing.__main__ import main
from keras_remote_airflow.testing.api import Api
from keras_remote_airflow.testing.calls import Call, Receiver, Reply


class XmlApi(Api):
    """The JSON API, and the XML API's uploads."""

    def receive(self, call: Call, answer_batched: Callable[[Call], Reply]) -> Receiver:
        if call.method != "PUT" or call.path.startswith(("/upload/", "/storage/")):
            return super().receive(call, answer_batched)
        _, bucket, name = call.path.split("/", 2)
        call.method = "POST"
        call.path = f"/upload/storage/v1/b/{bucket}/o"
        call.query = {"uploadType": "media", "name": unquote(name)}
        media = super().receive(call, answer_batched)

        def answer() -> Reply:
            media.answer()
            return Reply(200, {"ETag": '"1"', "x-goog-generation": "1"})

        return Receiver(answer, media.write, media.abort)


if __name__ == "__main__":
    server.Api = XmlApi  # type: ignore[attr-defined]
    sys.exit(main())
