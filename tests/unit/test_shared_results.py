"""Which of several equal calls generates the images, and whom it tells when they are there."""

from __future__ import annotations

import pytest

from serve.dispatch.protocol import AdmissionRequest, ResultFinished
from serve.dispatch.shared_results import SharedResults


def request(call_id: str, key: str = "k", *, follows: bool = False) -> AdmissionRequest:
    return AdmissionRequest(call_id, "t", call_id, result_key=key, follows=follows)


@pytest.fixture
def results() -> SharedResults:
    """One call leads at the Ingress `a`, and two others follow it."""
    results = SharedResults()
    for session, call in (("a", "1"), ("b", "2"), ("c", "3")):
        follows = results.must_follow(session, request(call))
        assert follows == (session != "a")
        results.admitted(session, request(call, follows=follows))
    return results


TOLD = [ResultFinished("b", "2"), ResultFinished("c", "3")]


def test_followers_are_told_once_that_the_leader_is_done(results: SharedResults) -> None:
    assert results.finish("b", "k") == []  # a follower ends nothing
    assert results.finish("a", "k") == TOLD
    assert results.finish("a", "k") == []
    assert not results.must_follow("b", request("4"))


def test_followers_are_told_that_the_leaders_ingress_is_gone(results: SharedResults) -> None:
    assert results.end_session("b") == []
    assert results.end_session("a") == TOLD
    assert not results.must_follow("b", request("4"))


def test_only_calls_with_the_same_key_follow(results: SharedResults) -> None:
    assert not results.must_follow("b", request("4", "other"))
    results.admitted("b", request("4", ""))
    assert not results.must_follow("c", request("5", ""))


def test_followers_whose_leader_does_not_come_back_are_told() -> None:
    """After a restart the followers may report before the leader, or without it."""
    results = SharedResults()
    results.admitted("b", request("2", follows=True))
    results.admitted("c", request("3", "led", follows=True))
    results.admitted("a", request("1", "led"))
    assert results.end_leaderless() == [ResultFinished("b", "2")]
    assert results.finish("a", "led") == [ResultFinished("c", "3")]
