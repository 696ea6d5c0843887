"""The JSON API over plain HTTP: statuses, reasons and bytes, without a client library between."""

from __future__ import annotations

import base64
import gzip
import hashlib
from typing import Any
from urllib.parse import quote

import google_crc32c
import pytest

ILLEGAL_NAMES = {
    "empty": "",
    "too long": "x" * 1025,
    "too long in UTF-8": "é" * 513,
    "carriage return": "a\rb",
    "line feed": "a\nb",
    "dot": ".",
    "dot dot": "..",
    "acme": ".well-known/acme-challenge/x",
}
LEGAL_NAMES = [
    "a",
    "a/b",
    "/",
    "//",
    "/leading",
    "trailing/",
    "../../etc/passwd",
    "a/../b",
    "./x",
    "x" * 1024,
    "é" * 512,
    "e\u0301",
    "snow ☃ and 🐍",
    "100%",
    "%2F",
    "a+b c",
    "?query=1#fragment",
    "[x]*{y}",
    "quote\"and'quote",
    "back\\slash",
    "tab\there",
    "nul\0here",
    "C:\\con",
]


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@pytest.mark.parametrize("name", LEGAL_NAMES)
def test_every_legal_name_is_stored_read_listed_and_deleted(call: Any, name: str) -> None:
    assert call.media(name, name.encode()).json["name"] == name
    assert call.download(name).body == name.encode()
    assert [item["name"] for item in call("GET", "/storage/v1/b/demo/o").json["items"]] == [name]
    assert call("DELETE", f"/storage/v1/b/demo/o/{quote(name, safe='')}").status == 204
    assert call.download(name).status == 404


@pytest.mark.parametrize("name", ILLEGAL_NAMES.values(), ids=ILLEGAL_NAMES)
def test_an_illegal_name_is_refused_however_it_comes(call: Any, name: str) -> None:
    assert call.media(name, b"x").status == 400
    assert call.multipart({"name": name}, b"x").status == 400
    assert call.resumable({"name": name}).status == 400
    assert not call.server.objects("demo")


def test_an_object_and_a_prefix_of_the_same_name_coexist(call: Any) -> None:
    for name in ("a", "a/b", "a/b/c"):
        call.media(name, name.encode())
    assert [call.download(name).body for name in ("a", "a/b", "a/b/c")] == [b"a", b"a/b", b"a/b/c"]


def test_an_empty_object_is_an_object(call: Any) -> None:
    resource = call.media("empty", b"").json
    assert (resource["size"], resource["crc32c"]) == ("0", "AAAAAA==")
    assert resource["md5Hash"] == md5(b"")
    assert call.download("empty").body == b""
    assert call.download("empty", range="bytes=0-").status == 416


def test_the_resource_describes_the_bytes(call: Any) -> None:
    resource = call.multipart(
        {"name": "d/x.csv", "metadata": {"k": "v"}, "cacheControl": "no-store"}, b"1,2\n"
    ).json
    assert resource["kind"] == "storage#object"
    assert resource["bucket"] == "demo"
    assert resource["size"] == "4"
    assert resource["crc32c"] == crc32c(b"1,2\n")
    assert resource["md5Hash"] == md5(b"1,2\n")
    assert resource["contentType"] == "text/csv"
    assert resource["metadata"] == {"k": "v"}
    assert resource["cacheControl"] == "no-store"
    assert resource["metageneration"] == "1"
    assert resource["id"] == f"demo/d/x.csv/{resource['generation']}"
    assert call("GET", resource["selfLink"]).json == resource
    assert call("GET", resource["mediaLink"]).body == b"1,2\n"


def test_a_large_object_has_an_md5_as_well(call: Any) -> None:
    data = bytes(2_000_000)
    assert call.media("x", data).json["md5Hash"] == md5(data)
    assert call.server.objects("demo")["x"].md5 == md5(data)


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/related; boundary="=_x\'y"',
        "multipart/related; boundary='sep'",
        "multipart/related; boundary=sep",
        "Multipart/Related; type=a; Boundary=sep; charset=utf-8",
    ],
)
@pytest.mark.parametrize("newline", [b"\r\n", b"\n"], ids=["crlf", "lf"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n--",
        b"--sep",
        b"x\r\n--sepal\r\n",
        b"\r\n--se",
        b"\0" * 3,
        b"ends with newline\n",
        b"ends with crlf\r\n",
        bytes(range(256)) * 9000,  # more than one piece on the wire
    ],
    ids=lambda data: repr(data[:14]),
)
def test_multipart_bytes_are_exact(
    call: Any, content_type: str, newline: bytes, data: bytes
) -> None:
    boundary = b"=_x'y" if "=_x" in content_type else b"sep"
    body = newline.join(
        [
            *[b"--" + boundary, b"Content-Type: application/json", b"", b'{"name": "m"}'],
            *[b"--" + boundary, b"Content-Type: application/octet-stream", b"", data],
            b"--" + boundary + b"--",
        ]
    )
    path = "/upload/storage/v1/b/demo/o?uploadType=multipart"
    assert call("POST", path, body, {"Content-Type": content_type}).status == 200
    assert call.server.objects("demo")["m"].data == data


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no boundary at all",
        b'--sep\r\n\r\n{"name": "m"}\r\n--sep--',
        b'--sep\r\n\r\n{"name": "m"}\r\n--sep\r\n\r\ndata',
        b'--sep\r\n\r\n{"name": "m"}\r\n--sep\r\n\r\ndata\r\n--sep\r\n\r\nthird\r\n--sep--',
        b"--sep\r\n\r\nnot json\r\n--sep\r\n\r\ndata\r\n--sep--",
        b"--sep\r\n\r\n" + b"[" * 10_000 + b"\r\n--sep\r\n\r\ndata\r\n--sep--",
        b'--sep\r\n\r\n["name"]\r\n--sep\r\n\r\ndata\r\n--sep--',
        b"--sep\r\n\r\n{}\r\n--sep\r\n\r\ndata\r\n--sep--",
    ],
)
def test_malformed_multipart_is_400_and_stores_nothing(call: Any, body: bytes) -> None:
    path = "/upload/storage/v1/b/demo/o?uploadType=multipart"
    answer = call("POST", path, body, {"Content-Type": "multipart/related; boundary=sep"})
    assert answer.status == 400
    assert not call.server.objects("demo")


def test_a_multipart_upload_without_boundary_is_400(call: Any) -> None:
    path = "/upload/storage/v1/b/demo/o?uploadType=multipart"
    assert call("POST", path, b"x", {"Content-Type": "application/json"}).status == 400


@pytest.mark.parametrize("key", ["crc32c", "md5Hash"])
def test_a_declared_hash_in_multipart_metadata_is_checked(call: Any, key: str) -> None:
    right = {"crc32c": crc32c(b"data"), "md5Hash": md5(b"data")}[key]
    wrong = {"crc32c": crc32c(b"other"), "md5Hash": md5(b"other")}[key]
    answer = call.multipart({"name": "x", key: wrong}, b"data")
    assert (answer.status, answer.reason) == (400, "invalid")
    assert right in answer.json["error"]["message"]
    assert not call.server.objects("demo")
    assert call.multipart({"name": "x", key: right}, b"data").status == 200


@pytest.mark.parametrize("header", ["crc32c={crc}", "md5={md5}", "crc32c={crc},md5={md5}"])
def test_a_hash_in_x_goog_hash_is_checked(call: Any, header: str) -> None:
    wrong = header.format(crc=crc32c(b"other"), md5=md5(b"other"))
    right = header.format(crc=crc32c(b"data"), md5=md5(b"data"))
    assert call.media("x", b"data", x_goog_hash=wrong).status == 400
    assert call.multipart({"name": "x"}, b"data", x_goog_hash=wrong).status == 400
    assert not call.server.objects("demo")
    assert call.media("x", b"data", x_goog_hash=right).status == 200
    assert call.multipart({"name": "x"}, b"data", x_goog_hash=right).status == 200


@pytest.mark.parametrize("wrong", ["", "AAAA", "not base64", "AAAAAAA="])
def test_a_hash_that_is_no_hash_is_400(call: Any, wrong: str) -> None:
    assert call.multipart({"name": "x", "crc32c": wrong}, b"data").status == 400
    assert not call.server.objects("demo")


def test_create_only_refuses_the_second_write(call: Any) -> None:
    first = call.media("x", b"first", "&ifGenerationMatch=0")
    assert first.status == 200
    second = call.media("x", b"second", "&ifGenerationMatch=0")
    assert (second.status, second.reason) == (412, "conditionNotMet")
    assert call.download("x").body == b"first"


def test_generation_and_metageneration_grow_as_they_should(call: Any) -> None:
    first = call.media("x", b"1").json
    second = call.media("x", b"2").json
    assert int(second["generation"]) > int(first["generation"])
    patched = call("PATCH", "/storage/v1/b/demo/o/x", {"metadata": {"k": "v"}}).json
    assert (patched["generation"], patched["metageneration"]) == (second["generation"], "2")
    assert call.download("x", f"&generation={first['generation']}").status == 404
    assert call.download("x", f"&generation={second['generation']}").body == b"2"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("ifGenerationMatch={g}", 200),
        ("ifGenerationMatch=1", 412),
        ("ifGenerationMatch=0", 412),
        ("ifGenerationNotMatch=1", 200),
        ("ifGenerationNotMatch={g}", 304),
        ("ifMetagenerationMatch=1", 200),
        ("ifMetagenerationMatch=2", 412),
        ("ifMetagenerationNotMatch=1", 304),
        ("ifGenerationMatch=x", 400),
    ],
)
def test_preconditions_hold_on_reads(call: Any, query: str, status: int) -> None:
    generation = call.media("x", b"1").json["generation"]
    query = query.format(g=generation)
    assert call("GET", f"/storage/v1/b/demo/o/x?{query}").status == status
    assert call.download("x", f"&{query}").status == status


@pytest.mark.parametrize(
    ("header", "etag", "read", "deleted"),
    [
        ("If-None-Match", "{etag}", 304, 412),
        ("If-None-Match", '"other", W/"{etag}"', 304, 412),
        ("If-None-Match", "*", 304, 412),
        ("If-None-Match", '"other"', 200, 204),
        ("If-Match", "{etag}", 200, 204),
        ("If-Match", '"other"', 412, 412),
    ],
)
def test_etags_are_preconditions(
    call: Any, header: str, etag: str, read: int, deleted: int
) -> None:
    made = call.media("x", b"1").json
    assert call.download("x").headers["etag"] == made["etag"]
    headers = {header: etag.format(etag=made["etag"])}
    for path in ("/storage/v1/b/demo/o/x", made["mediaLink"]):
        assert call("GET", path, None, headers).status == read
    bucket = call("GET", "/storage/v1/b/demo").json["etag"]
    headers_of_bucket = {header: etag.format(etag=bucket)}
    assert call("GET", "/storage/v1/b/demo", None, headers_of_bucket).status == read
    assert call("DELETE", "/storage/v1/b/demo/o/x", None, headers).status == deleted


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("ifGenerationMatch={g}", 204),
        ("ifGenerationMatch=1", 412),
        ("ifGenerationNotMatch={g}", 412),
        ("ifMetagenerationMatch=1", 204),
        ("ifMetagenerationMatch=7", 412),
        ("generation={g}", 204),
        ("generation=1", 404),
    ],
)
def test_preconditions_hold_on_deletes(call: Any, query: str, status: int) -> None:
    generation = call.media("x", b"1").json["generation"]
    answer = call("DELETE", f"/storage/v1/b/demo/o/x?{query.format(g=generation)}")
    assert answer.status == status
    assert ("x" in call.server.objects("demo")) == (status != 204)


def test_what_is_missing_is_404(call: Any) -> None:
    assert call("GET", "/storage/v1/b/demo/o/nope").reason == "notFound"
    for method, path in [
        ("GET", "/storage/v1/b/demo/o/nope"),
        ("GET", "/storage/v1/b/demo/o/nope?alt=media"),
        ("DELETE", "/storage/v1/b/demo/o/nope"),
        ("PATCH", "/storage/v1/b/demo/o/nope"),
        ("POST", "/storage/v1/b/demo/o/nope/copyTo/b/demo/o/x"),
        ("GET", "/storage/v1/b/nope"),
        ("GET", "/storage/v1/b/nope/o"),
        ("DELETE", "/storage/v1/b/nope"),
        ("POST", "/upload/storage/v1/b/nope/o?uploadType=media&name=x"),
        ("POST", "/upload/storage/v1/b/nope/o?uploadType=resumable&name=x"),
        ("PUT", "/upload/storage/v1/b/demo/o?uploadType=resumable&upload_id=nope"),
        ("GET", "/"),
        ("GET", "/storage/v2/b"),
    ]:
        assert call(method, path, {} if method in ("PATCH", "POST") else None).status == 404


def test_a_bucket_is_created_once_and_deleted_when_empty(call: Any) -> None:
    assert call("POST", "/storage/v1/b?project=p", {"name": "other"}).status == 200
    again = call("POST", "/storage/v1/b?project=p", {"name": "other"})
    assert (again.status, again.reason) == (409, "conflict")
    call.server.put("other", "x", b"")
    assert call("DELETE", "/storage/v1/b/other").status == 409
    call.server.delete("other", "x")
    assert call("DELETE", "/storage/v1/b/other").status == 204
    assert [b["name"] for b in call("GET", "/storage/v1/b?project=p").json["items"]] == ["demo"]


@pytest.mark.parametrize(
    "name",
    [
        *["", "ab", "UPPER", "-x-", "a..b", "../etc", "a/b", "x" * 64, "a." + "x" * 64],
        *["a.b." * 55 + "abc", "192.168.5.4", "goog-x", "my-google-data", "my-g00gle", "é-x"],
    ],
)
def test_an_illegal_bucket_name_is_400(call: Any, name: str) -> None:
    assert call("POST", "/storage/v1/b?project=p", {"name": name}).status == 400


@pytest.mark.parametrize(
    "name", ["abc", "a_b-c", "x" * 63, "data.example.com", "1.2.3", "1" * 9, "a." + "x" * 63]
)
def test_a_legal_bucket_name_is_taken(call: Any, name: str) -> None:
    assert call("POST", "/storage/v1/b?project=p", {"name": name}).json["name"] == name


@pytest.mark.parametrize(
    ("given", "location", "kind"),
    [
        ({}, "US", "multi-region"),
        ({"location": "eu"}, "EU", "multi-region"),
        ({"location": "europe-west3"}, "EUROPE-WEST3", "region"),
        ({"location": "nam4"}, "NAM4", "dual-region"),
        (
            {
                "location": "us",
                "customPlacementConfig": {"dataLocations": ["US-EAST1", "US-WEST1"]},
            },
            "US",
            "dual-region",
        ),
    ],
)
def test_a_bucket_lies_where_it_was_created(
    call: Any, given: dict[str, Any], location: str, kind: str
) -> None:
    made = call("POST", "/storage/v1/b?project=p", {"name": "placed", **given}).json
    kept = call("PUT", "/storage/v1/b/placed", {"location": "asia", "labels": {"a": "b"}}).json
    for bucket in (made, kept):
        assert (bucket["location"], bucket["locationType"]) == (location, kind)


def test_a_bucket_in_no_place_is_400(call: Any) -> None:
    made = call("POST", "/storage/v1/b?project=p", {"name": "placed", "location": "moon"})
    assert made.status == 400


def test_lifecycle_rules_are_kept_on_the_bucket(call: Any) -> None:
    lifecycle = {"rule": [{"action": {"type": "Delete"}, "condition": {"age": 30}}]}
    call("POST", "/storage/v1/b?project=p", {"name": "aged", "lifecycle": lifecycle})
    assert call("GET", "/storage/v1/b/aged").json["lifecycle"] == lifecycle
    changed = call("PATCH", "/storage/v1/b/aged", {"lifecycle": None, "labels": {"a": "b"}}).json
    assert "lifecycle" not in changed
    assert (changed["labels"], changed["metageneration"]) == ({"a": "b"}, "2")


def test_metadata_is_merged_by_patch_and_replaced_by_update(call: Any) -> None:
    call.multipart({"name": "x", "metadata": {"a": "1", "b": "2"}}, b"")
    patch = {"metadata": {"b": None, "c": "3"}, "contentType": "text/plain"}
    patched = call("PATCH", "/storage/v1/b/demo/o/x", patch).json
    assert (patched["metadata"], patched["contentType"]) == ({"a": "1", "c": "3"}, "text/plain")
    updated = call("PUT", "/storage/v1/b/demo/o/x", {"metadata": {"z": "9"}}).json
    assert updated["metadata"] == {"z": "9"}
    assert "contentType" not in updated


@pytest.mark.parametrize(
    ("header", "status", "first", "end"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=2-5", 206, 2, 6),
        ("bytes=5-", 206, 5, 10),
        ("bytes=5-99", 206, 5, 10),
        ("bytes=-3", 206, 7, 10),
        ("bytes=-99", 206, 0, 10),
        ("bytes=10-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=5-2", 200, 0, 10),
        ("lines=1-2", 200, 0, 10),
        ("bytes=0-1,3-4", 200, 0, 10),
    ],
)
def test_ranges_are_honoured(call: Any, header: str, status: int, first: int, end: int) -> None:
    data = b"0123456789"
    call.media("x", data)
    answer = call.download("x", range=header)
    assert answer.status == status
    if status == 416:
        assert answer.headers["content-range"] == "bytes */10"
        return
    assert answer.body == data[first:end]
    assert answer.headers["x-goog-hash"] == f"crc32c={crc32c(data)},md5={md5(data)}"
    assert answer.headers["x-goog-stored-content-length"] == "10"
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/10"


def test_both_download_paths_send_the_same(call: Any) -> None:
    generation = call.media("a/b", b"data", content_type="text/csv").json["generation"]
    plain = call("GET", "/storage/v1/b/demo/o/a%2Fb?alt=media")
    assert plain.body == call.download("a/b").body == b"data"
    assert plain.headers["x-goog-generation"] == generation
    assert plain.headers["content-type"] == "text/csv"


def test_an_encoded_slash_is_part_of_the_name_and_a_bare_one_is_not(call: Any) -> None:
    call.media("a/b", b"data")
    assert call("GET", "/storage/v1/b/demo/o/a%2Fb").status == 200
    assert call("GET", "/storage/v1/b/demo/o/a/b").status == 404


@pytest.mark.parametrize("fields", ["size,crc32", "items(name)", "name,", "name(", "(", "a/", ","])
def test_bad_fields_are_400_before_anything_is_done(call: Any, fields: str) -> None:
    query = f"&fields={fields}"
    assert call.media("x", b"data", query).reason == "invalidParameter"
    assert call.multipart({"name": "x"}, b"data", query).status == 400
    assert call.resumable({"name": "x"}, query).status == 400
    assert call("POST", f"/storage/v1/b?project=p{query}", {"name": "other"}).status == 400
    assert not call.server.objects("demo")
    call.media("x", b"data")
    assert call("DELETE", f"/storage/v1/b/demo/o/x?fields={fields}").status == 400
    assert call("GET", f"/storage/v1/b/demo/o/x?fields={fields}").status == 400
    assert call("GET", "/storage/v1/b/demo/o?fields=size").status == 400
    assert call("GET", "/storage/v1/b/demo/o?fields=items(sice)").status == 400
    assert list(call.server.objects("demo")) == ["x"]


def test_fields_select_a_part_of_the_answer(call: Any) -> None:
    for name in ("a", "b"):
        call.multipart({"name": name, "metadata": {"k": "v", "l": "w"}}, b"x")
    listing = "/storage/v1/b/demo/o?maxResults=1&fields="
    page = call("GET", listing + "items(name,size,crc32c),nextPageToken").json
    assert page["items"] == [{"name": "a", "size": "1", "crc32c": crc32c(b"x")}]
    assert set(page) == {"items", "nextPageToken"}
    assert call("GET", listing + "items/metadata/k").json == {"items": [{"metadata": {"k": "v"}}]}
    assert call("GET", listing + "items(name,updated)").json["items"][0].keys() == {
        "name",
        "updated",
    }
    assert set(call("GET", listing + "nextPageToken").json) == {"nextPageToken"}
    assert call("GET", "/storage/v1/b/demo/o/a?fields=name,bucket").json == {
        "name": "a",
        "bucket": "demo",
    }
    assert call.media("c", b"", "&fields=generation").json.keys() == {"generation"}
    assert call("GET", listing + "items(").status == 400


def test_compose_concatenates_and_has_no_md5(call: Any) -> None:
    call.media("a", b"one")
    generation = call.media("b", b"two").json["generation"]
    body = {
        "sourceObjects": [{"name": "a"}, {"name": "b", "generation": generation}, {"name": "a"}],
        "destination": {"contentType": "text/plain", "metadata": {"k": "v"}},
    }
    made = call("POST", "/storage/v1/b/demo/o/c/compose?ifGenerationMatch=0", body).json
    assert call.download("c").body == b"onetwoone"
    assert made["crc32c"] == crc32c(b"onetwoone")
    assert "md5Hash" not in made
    assert (made["componentCount"], made["metadata"]) == (3, {"k": "v"})
    again = call("POST", "/storage/v1/b/demo/o/c/compose?ifGenerationMatch=0", body)
    assert again.status == 412
    body["sourceObjects"] = [{"name": "a"}] * 33
    assert call("POST", "/storage/v1/b/demo/o/d/compose", body).status == 400


def test_hashes_in_a_resource_that_is_sent_back_are_not_declared(call: Any) -> None:
    call.media("a", b"one")
    old = call.media("b", b"two", content_type="text/csv").json
    body = {"sourceObjects": [{"name": "a"}, {"name": "b"}], "destination": old}
    assert call("POST", "/storage/v1/b/demo/o/b/compose", body).json["size"] == "6"
    assert call("POST", "/storage/v1/b/demo/o/a/copyTo/b/demo/o/b", old).json["size"] == "3"
    for method in ("PATCH", "PUT"):
        assert call(method, "/storage/v1/b/demo/o/a", {"crc32c": "?"}).status == 200


@pytest.mark.parametrize("verb", ["rewriteTo", "copyTo"])
def test_copies_keep_bytes_and_metadata(call: Any, verb: str) -> None:
    call.server.create_bucket("other")
    call.multipart({"name": "a", "metadata": {"k": "v"}}, b"data")
    answer = call("POST", f"/storage/v1/b/demo/o/a/{verb}/b/other/o/x%2Fy", {}).json
    resource = answer["resource"] if verb == "rewriteTo" else answer
    assert (resource["name"], resource["metadata"]) == ("x/y", {"k": "v"})
    assert verb == "copyTo" or (answer["done"], answer["objectSize"]) == (True, "4")
    call.server.delete("demo", "a")
    assert call.server.objects("other")["x/y"].data == b"data"


def test_a_name_may_be_a_verb(call: Any) -> None:
    call.media("copyTo", b"data")
    assert call("POST", "/storage/v1/b/demo/o/copyTo/rewriteTo/b/demo/o/compose", {}).json["done"]
    assert call.download("compose").body == b"data"


def test_settings_of_the_object_are_headers_of_a_download(call: Any) -> None:
    settings = {
        "contentEncoding": "gzip",
        "contentLanguage": "de",
        "contentDisposition": 'inline; filename="a\r\nb"',
        "storageClass": "NEARLINE",
    }
    made = call.multipart({"name": "x", "contentType": "text/\ud800", **settings}, b"data")
    assert made.json["contentType"] == "text/?"
    headers = call.download("x").headers
    assert headers["content-encoding"] == headers["x-goog-stored-content-encoding"] == "gzip"
    assert headers["content-language"] == "de"
    assert headers["content-disposition"] == 'inline; filename="a  b"'
    assert headers["x-goog-storage-class"] == "NEARLINE"
    assert headers["content-type"] == "text/?"


@pytest.mark.parametrize(
    ("accepted", "settings", "unpacks"),
    [
        ("identity", {"contentEncoding": "gzip"}, True),
        ("gzip, deflate", {"contentEncoding": "gzip"}, False),
        ("identity", {"contentEncoding": "gzip", "cacheControl": "no-transform"}, False),
        ("identity", {}, False),
    ],
)
def test_gzip_is_unpacked_for_clients_that_do_not_accept_it(
    call: Any, accepted: str, settings: dict[str, str], unpacks: bool
) -> None:
    stored = gzip.compress(b"data")
    call.multipart({"name": "x", **settings}, stored)
    answer = call.download("x", accept_encoding=accepted, range="bytes=0-1")
    if unpacks:
        assert (answer.status, answer.body) == (200, b"data")
    else:
        assert (answer.status, answer.body) == (206, stored[:2])
    encoded = "contentEncoding" in settings
    assert ("content-encoding" in answer.headers) == (encoded and not unpacks)
    assert answer.headers["x-goog-stored-content-encoding"] == ("gzip" if encoded else "identity")
    assert answer.headers["x-goog-hash"] == f"crc32c={crc32c(stored)},md5={md5(stored)}"


def test_an_object_can_be_rewritten_onto_itself(call: Any) -> None:
    before = call.media("a", b"data").json
    call("POST", "/storage/v1/b/demo/o/a/rewriteTo/b/demo/o/a", {"metadata": {"k": "v"}})
    after = call("GET", "/storage/v1/b/demo/o/a").json
    assert after["metadata"] == {"k": "v"}
    assert int(after["generation"]) > int(before["generation"])
    assert call.download("a").body == b"data"


def test_move_takes_the_source_away(call: Any) -> None:
    call.media("a", b"data")
    assert call("POST", "/storage/v1/b/demo/o/a/moveTo/o/b").json["name"] == "b"
    assert {n: o.data for n, o in call.server.objects("demo").items()} == {"b": b"data"}


def test_a_batch_answers_every_call_in_order(call: Any) -> None:
    call.media("a", b"")
    call.media("b", b"")
    body = (
        b"--x\r\nContent-Type: application/http\r\nContent-ID: <id+1>\r\n\r\n"
        b"DELETE /storage/v1/b/demo/o/a HTTP/1.1\r\n\r\n\r\n"
        b"--x\r\nContent-Type: application/http\r\n\r\n"
        b"GET /storage/v1/b/demo/o/nope HTTP/1.1\r\n\r\n\r\n"
        b"--x\r\nContent-Type: application/http\r\n\r\n"
        b"PATCH /storage/v1/b/demo/o/b HTTP/1.1\r\nContent-Type: application/json\r\n\r\n"
        b'{"metadata": {"k": "v"}}\r\n'
        b"--x--"
    )
    answer = call("POST", "/batch/storage/v1", body, {"Content-Type": "multipart/mixed;boundary=x"})
    boundary = answer.headers["content-type"].split("boundary=")[1]
    parts = answer.body.decode().split(f"--{boundary}")[1:-1]
    assert "Content-ID: <response-id+1>" in parts[0]
    assert "Content-ID" not in parts[1]
    assert ["204" in parts[0], "404" in parts[1], "200" in parts[2]] == [True, True, True]
    assert {n: o.metadata for n, o in call.server.objects("demo").items()} == {"b": {"k": "v"}}


def test_a_batch_takes_at_most_a_hundred_calls(call: Any) -> None:
    part = b"--x\r\n\r\nDELETE /storage/v1/b/demo/o/a HTTP/1.1\r\n\r\n\r\n"
    headers = {"Content-Type": "multipart/mixed; boundary=x"}
    assert call("POST", "/batch/storage/v1", part * 100 + b"--x--", headers).status == 200
    assert call("POST", "/batch/storage/v1", part * 101 + b"--x--", headers).status == 400


def test_malformed_parameters_are_400(call: Any) -> None:
    for query in ("maxResults=x", "maxResults=-1", "pageToken=%21", "pageToken=AAAA", "fields=("):
        assert call("GET", f"/storage/v1/b/demo/o?{query}").status == 400
    assert call("PATCH", "/storage/v1/b/demo", b"{").reason == "parseError"


def test_a_refused_write_leaves_the_old_object(call: Any) -> None:
    call.media("x", b"old")
    assert call.media("x", b"new", x_goog_hash=f"crc32c={crc32c(b'?')}").status == 400
    assert call.media("x", b"new", "&ifGenerationMatch=1").status == 412
    assert call.download("x").body == b"old"


@pytest.mark.parametrize(
    "metadata", ["text", ["list"], {"k": 1}, {"k": {}}, {"k": "v" * 8192}, {"k": "\ud800"}]
)
def test_malformed_custom_metadata_is_400(call: Any, metadata: Any) -> None:
    assert call.multipart({"name": "x", "metadata": metadata}, b"").status == 400
    assert not call.server.objects("demo")


@pytest.mark.parametrize("sources", [None, [], "a", ["a"], [{}], [{"name": "nope"}]])
def test_compose_of_nonsense_is_refused(call: Any, sources: Any) -> None:
    answer = call("POST", "/storage/v1/b/demo/o/x/compose", {"sourceObjects": sources})
    assert answer.status in (400, 404)


def test_dialects_of_clients_are_understood(call: Any) -> None:
    for name in ("a/", "a/b"):
        call.media(name, b"")
    # google-cloud-storage writes booleans as Python does.
    for yes, no in (("True", "False"), ("true", "false"), ("TRUE", "")):
        listing = f"/storage/v1/b/demo/o?delimiter=/&includeTrailingDelimiter={yes}"
        assert [item["name"] for item in call("GET", listing).json["items"]] == ["a/"]
        listing = f"/storage/v1/b/demo/o?delimiter=/&includeTrailingDelimiter={no}"
        assert "items" not in call("GET", f"{listing}&softDeleted={no}").json
    for made in (
        call.media("z", b"", "&contentEncoding=gzip"),
        call.multipart({"name": "z"}, b"", "&contentEncoding=gzip"),
        call("PUT", call.resumable({"name": "z"}, "&contentEncoding=gzip").headers["location"]),
    ):
        assert made.json["contentEncoding"] == "gzip"
    assert call("POST", "/storage/v1/b/demo/o/z/rewriteTo/b/demo/o/y", b"null").json["done"]
