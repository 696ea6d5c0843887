"""Listings against a model: sort everything, filter, cut into pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keras_remote_airflow.testing.bodies import Body
from keras_remote_airflow.testing.buckets import Bucket
from keras_remote_airflow.testing.listing import list_page
from keras_remote_airflow.testing.objects import StoredObject

TEXT = st.text(alphabet="ab/é\U0010ffff", max_size=6)
NAME = st.text(alphabet="ab/é\U0010ffff", min_size=1, max_size=6)


def all_pages(names: list[str], query: dict[str, str], size: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    query = {**query, "maxResults": str(size)}
    while True:
        page = list_page(names, query)
        assert len(page.names) + len(page.prefixes) <= size
        found += [("name", name) for name in page.names]
        found += [("prefix", prefix) for prefix in page.prefixes]
        if page.next is None:
            return sorted(found)
        query["pageToken"] = page.next


def expected(names: set[str], query: dict[str, str]) -> list[tuple[str, str]]:
    found = set()
    for name in names:
        if not name.startswith(query["prefix"]) or name < query["startOffset"]:
            continue
        if query["endOffset"] and name >= query["endOffset"]:
            continue
        rest = name[len(query["prefix"]) :]
        head, delimiter, _ = rest.partition("/") if query["delimiter"] else (rest, "", "")
        if delimiter:
            found.add(("prefix", query["prefix"] + head + "/"))
        else:
            found.add(("name", name))
    return sorted(found)


@given(
    names=st.sets(NAME),
    prefix=TEXT,
    start=TEXT,
    end=TEXT,
    delimiter=st.sampled_from(["", "/"]),
    size=st.integers(1, 5),
)
def test_pages_add_up_to_what_the_model_says(
    names: set[str], prefix: str, start: str, end: str, delimiter: str, size: int
) -> None:
    query = {"prefix": prefix, "startOffset": start, "endOffset": end, "delimiter": delimiter}
    assert all_pages(sorted(names), query, size) == expected(names, query)


@given(st.lists(st.tuples(st.booleans(), NAME)))
def test_names_stay_sorted_through_additions_and_removals(changes: list[tuple[bool, str]]) -> None:
    bucket = Bucket("demo")
    for adding, name in changes:
        stored = StoredObject("demo", name, Body(), 1, "AAAAAA==")
        if adding:
            bucket.add(stored)
        elif name in bucket.objects:
            bucket.remove(stored)
        assert bucket.names() == sorted(bucket.objects)


@given(st.sets(NAME))
def test_the_order_is_that_of_utf8_bytes(texts: set[str]) -> None:
    assert sorted(texts) == sorted(texts, key=lambda text: text.encode())
