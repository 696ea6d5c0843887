"""Multipart bodies cut anywhere between two pieces on the wire."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from keras_remote_airflow.testing.bodies import Spool
from keras_remote_airflow.testing.multipart import RelatedReader, boundary_of

TRICKY = st.lists(
    st.sampled_from([b"\r\n--s", b"\r\n--", b"\r", b"\n", b"-", b"s", b"x", b"\n--s", b"\r\n"]),
    max_size=8,
).map(b"".join)


@given(data=TRICKY, cuts=st.sets(st.integers(0, 120)), newline=st.sampled_from([b"\r\n", b"\n"]))
def test_the_pieces_do_not_matter(data: bytes, cuts: set[int], newline: bytes) -> None:
    boundary = b"s\x01"  # no data above contains the whole of it
    body = newline.join(
        [
            *[b"--" + boundary, b"A: b", b"", b"meta"],
            *[b"--" + boundary, b"C: d", b"", data],
            *[b"--" + boundary + b"--", b""],
        ]
    )
    spool = Spool(None)
    opened: list[tuple[bytes, dict[str, str]]] = []

    def open_media(metadata: bytes, headers: dict[str, str]) -> Spool:
        opened.append((metadata, headers))
        return spool

    reader = RelatedReader(boundary, open_media)
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    for start, end in pairwise(edges):
        reader.write(body[start:end])
    reader.end()
    assert opened == [(b"meta", {"c": "d"})]
    assert b"".join(spool.finish().read()) == data


def test_boundaries_come_quoted_in_every_way() -> None:
    for value in ('"a b"', "'a b'"):
        assert boundary_of(f"multipart/related; boundary={value}") == b"a b"
    assert boundary_of("multipart/mixed;boundary=ab; x=y") == b"ab"
