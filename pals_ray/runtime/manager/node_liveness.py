"""Whether a node lives, is cut off, or is gone for good, from what Ray's head says and whether its raylet answers.

A host that lost its power and one whose link was cut look the same from the head, but the second goes on drawing
watts. So a silent node does not count as gone until its raylet has said goodbye, or its host refuses the connection,
which shows that no raylet runs there any more.
"""

from __future__ import annotations

import socket
from enum import Enum

import ray
from ray.core.generated.common_pb2 import NodeDeathInfo

#: A lossy link may need a second or two for the first packet of a connection to get through.
KNOCK_TIMEOUT_S = 3.0


class Knock(Enum):
    """What comes of a connection to a raylet's port."""

    ANSWERED = "answered"
    REFUSED = "refused"
    SILENCE = "silence"


class Standing(Enum):
    """How a node stands. One that is `CUT_OFF` may be dead or alive, and is assumed to draw what it last drew."""

    LIVES = "lives"
    CUT_OFF = "cut off"
    GONE = "gone"


def standing(node_id: str) -> Standing:
    """How a node of this cluster stands. Waits up to `KNOCK_TIMEOUT_S` for its raylet."""
    known = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    if known is None:
        return Standing.CUT_OFF
    said_goodbye = known["DeathReason"] == NodeDeathInfo.Reason.EXPECTED_TERMINATION
    return judge(
        knock(known["NodeManagerAddress"], known["NodeManagerPort"]), alive=known["Alive"], said_goodbye=said_goodbye
    )


def judge(answer: Knock, *, alive: bool, said_goodbye: bool) -> Standing:
    """How a node stands: from what its port answers, and whether it is alive to Ray's head or has said goodbye.

    A node that Ray gave up and that still answers was cut off for too long, or is shutting down: it soon ends itself.
    """
    if alive:
        return Standing.LIVES if answer is Knock.ANSWERED else Standing.CUT_OFF
    gone = answer is Knock.REFUSED or (said_goodbye and answer is Knock.SILENCE)
    return Standing.GONE if gone else Standing.CUT_OFF


def knock(address: str, port: int) -> Knock:
    """Connect to a raylet's port without sending anything."""
    try:
        socket.create_connection((address, port), timeout=KNOCK_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return Knock.REFUSED
    except OSError:
        return Knock.SILENCE
    return Knock.ANSWERED
