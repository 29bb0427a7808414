"""Joining a cluster as its client."""

from __future__ import annotations

import pytest

from pals_ray.runtime import client


@pytest.fixture
def init(monkeypatch):
    """What `ray.init` does at each call, first to last."""

    def answers(*errors):
        asked, left = [], list(errors)

        def fake(address, **_):
            asked.append(address)
            if left:
                raise left.pop(0)

        monkeypatch.setattr(client.ray, "init", fake)
        monkeypatch.setattr(client.ray, "is_initialized", lambda: False)
        monkeypatch.setattr(client, "connect_from_actor", lambda: "a fleet")
        return asked

    return answers


def test_a_client_server_that_the_head_fails_to_start_is_asked_for_once_more(init):
    asked = init(ConnectionAbortedError("Starting Ray client server failed"))
    assert client.connect("ray://192.0.2.1:10001") == "a fleet"
    assert asked == ["ray://192.0.2.1:10001"] * 2


def test_one_that_fails_twice_is_told(init):
    init(*[ConnectionAbortedError("Starting Ray client server failed")] * 2)
    with pytest.raises(client.NotRunning, match=r"192\.0\.2\.1.*client server failed"):
        client.connect("ray://192.0.2.1:10001")
