"""Objects that may not go yet: holds, and the retention policy of a bucket."""

from __future__ import annotations

from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

OBJECT = "/storage/v1/b/demo/o/x"
HOUR = {"retentionPolicy": {"retentionPeriod": "3600"}}


def removals(call: Any) -> list[tuple[int, str]]:
    """Try to overwrite and to delete x in every way; the objects are as before."""
    call.server.put("demo", "y", b"other")
    answers = [
        call.media("x", b"new"),
        call.multipart({"name": "x"}, b"new"),
        call.resumable({"name": "x"}),
        call("POST", f"{OBJECT}/compose", {"sourceObjects": [{"name": "y"}]}),
        call("POST", "/storage/v1/b/demo/o/y/rewriteTo/b/demo/o/x", {}),
        call("POST", "/storage/v1/b/demo/o/y/moveTo/o/x"),
        call("POST", f"{OBJECT}/moveTo/o/z"),
        call("DELETE", OBJECT),
    ]
    assert {n: o.data for n, o in call.server.objects("demo").items()} == {
        "x": b"old",
        "y": b"other",
    }
    return [(answer.status, answer.reason) for answer in answers]


@pytest.mark.parametrize("hold", ["temporaryHold", "eventBasedHold"])
def test_what_is_held_can_neither_be_overwritten_nor_deleted(call: Any, hold: str) -> None:
    call.media("x", b"old")
    assert call("PATCH", OBJECT, {hold: True}).json[hold] is True
    assert set(removals(call)) == {(403, "objectUnderActiveHold")}
    assert call("PATCH", OBJECT, {"metadata": {"k": "v"}}).status == 200
    assert call("PATCH", OBJECT, {hold: False}).status == 200
    assert call.media("x", b"new").status == 200
    assert call("PATCH", OBJECT, {hold: "yes"}).status == 400


def test_a_hold_may_come_with_the_upload_and_is_not_copied(call: Any) -> None:
    call.multipart({"name": "x", "temporaryHold": True}, b"old")
    assert call("DELETE", OBJECT).status == 403
    copy = call("POST", f"{OBJECT}/copyTo/b/demo/o/copy", {}).json
    assert "temporaryHold" not in copy


def test_a_retention_policy_keeps_objects_for_its_period(call: Any) -> None:
    call.media("x", b"old")
    assert call("PATCH", "/storage/v1/b/demo", HOUR).status == 200
    until = call("GET", OBJECT).json["retentionExpirationTime"]
    assert until > call("GET", OBJECT).json["timeCreated"]
    listed = call("GET", "/storage/v1/b/demo/o").json["items"][0]
    assert listed["retentionExpirationTime"] == until
    assert set(removals(call)) == {(403, "retentionPolicyNotMet")}
    call.server.advance_clock(3600)
    assert call("DELETE", OBJECT).status == 204


def test_the_period_begins_when_an_event_based_hold_ends(call: Any) -> None:
    call("PATCH", "/storage/v1/b/demo", {**HOUR, "defaultEventBasedHold": True})
    assert call.media("x", b"old").json["eventBasedHold"] is True
    assert "retentionExpirationTime" not in call("GET", OBJECT).json
    call.server.advance_clock(7200)
    assert call("DELETE", OBJECT).reason == "objectUnderActiveHold"
    call("PATCH", OBJECT, {"eventBasedHold": False})
    assert call("DELETE", OBJECT).reason == "retentionPolicyNotMet"
    call.server.advance_clock(3600)
    assert call("DELETE", OBJECT).status == 204


def test_answers_tell_the_time_of_the_clock(call: Any) -> None:
    before = parsedate_to_datetime(call.media("x", b"1").headers["date"])
    call.server.advance_clock(86400)
    answer = call.media("x", b"2")
    assert (parsedate_to_datetime(answer.headers["date"]) - before).total_seconds() >= 86400
    created = datetime.fromisoformat(answer.json["timeCreated"])
    assert (created - before).total_seconds() >= 86399  # headers have no fractions


def test_the_back_door_is_always_open(call: Any) -> None:
    call("PATCH", "/storage/v1/b/demo", HOUR)
    call.server.put("demo", "x", b"1")
    call.server.put("demo", "x", b"2")
    call.server.delete("demo", "x")
    assert call.server.objects("demo") == {}


@pytest.mark.parametrize("policy", ["x", {}, {"retentionPeriod": "0"}, {"retentionPeriod": "a"}])
def test_a_malformed_policy_is_400(call: Any, policy: Any) -> None:
    assert call("PATCH", "/storage/v1/b/demo", {"retentionPolicy": policy}).status == 400
