"""Buckets and servers unlike the usual, which `StorageServer.play` is for."""

import gzip
import json

import pytest

from keras_remote_airflow.testing import StorageServer

from .conftest import Caller

LIST = "/storage/v1/b/demo/o"
WRONG = "AAAAAA=="


@pytest.mark.parametrize("lacking", [{"crc32c", "md5Hash"}, {"size"}])
@pytest.mark.parametrize("fields", ["", "?fields=items(name,size,crc32c,md5Hash)"])
def test_listings_lack_what_a_single_object_shows(
    server: StorageServer, call: Caller, lacking: set[str], fields: str
) -> None:
    server.put("demo", "a", b"x")
    server.play(listings_lack=lacking)
    [listed] = call("GET", LIST + fields).json["items"]
    shown = call("GET", LIST + "/a").json
    assert not lacking & listed.keys()
    assert lacking <= shown.keys()
    assert listed.items() <= shown.items()
    server.play()
    assert lacking <= call("GET", LIST + fields).json["items"][0].keys()


def test_json_is_compressed_for_clients_that_accept_gzip(
    server: StorageServer, call: Caller
) -> None:
    server.put("demo", "a", b"not compressed")
    server.play(compresses_json=True)
    for path, status in ((LIST, 200), (LIST + "/missing", 404)):
        plain = call("GET", path, headers={"Accept-Encoding": "identity"})
        packed = call("GET", path, headers={"Accept-Encoding": "gzip, deflate"})
        assert (plain.status, packed.status) == (status, status)
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == "gzip"
        assert json.loads(gzip.decompress(packed.body)) == plain.json
    download = call.download("a", accept_encoding="gzip")
    assert (download.body, "content-encoding" in download.headers) == (b"not compressed", False)


def test_a_server_that_checks_no_hash_stores_what_arrived(
    server: StorageServer, call: Caller
) -> None:
    assert call.multipart({"name": "a", "crc32c": WRONG}, b"x").status == 400
    server.play(checks_hashes=False)
    answer = call.multipart({"name": "a", "crc32c": WRONG}, b"x")
    assert answer.status == 200
    assert answer.json["crc32c"] == server.objects("demo")["a"].crc32c != WRONG
