"""The local server with one route more: the XML API's `PUT /bucket/object`, for obstore.

`python -m keras_remote_airflow.testing` speaks the JSON API alone, as all other contenders do.
Here such a PUT is read as the JSON API's media upload, and its answer gets the headers that the
XML API promises (https://cloud.google.com/storage/docs/xml-api/put-object-upload).
"""

import sys
from typing import Any
from urllib.parse import quote, unquote

from keras_remote_airflow.testing import http
from keras_remote_airflow.testing.__main__ import main
from keras_remote_airflow.testing.api import Api

_parse_head = http.parse_head
_serve = Api.serve


def _parse_xml_head(head: bytes) -> http.HttpRequest:
    request = _parse_head(head)
    if request.method == "PUT" and not request.path.startswith(("/upload/", "/storage/")):
        _, bucket, name = request.path.split("/", 2)
        request.method = "POST"
        request.path = f"/upload/storage/v1/b/{quote(bucket)}/o"
        request.query = {"uploadType": "media", "name": unquote(name), "xml": "1"}
    return request


def _serve_xml(self: Api, request: http.HttpRequest, batch_call: Any) -> http.Response:
    response = _serve(self, request, batch_call)
    if "xml" in request.query:
        response.headers = {**response.headers, "ETag": '"1"', "x-goog-generation": "1"}
        response.body = b""
    return response


if __name__ == "__main__":
    http.parse_head = _parse_xml_head
    Api.serve = _serve_xml  # type: ignore[method-assign]
    sys.exit(main())
