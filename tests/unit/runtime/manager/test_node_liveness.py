"""When a node is taken for gone: never by silence alone, since a host that is merely cut off goes on drawing."""

import socket

import pytest

from pals_ray.runtime.manager import node_liveness
from pals_ray.runtime.manager.node_liveness import Knock, Standing, judge, knock


@pytest.mark.parametrize("said_goodbye", [False, True])
def test_a_node_that_rays_head_holds_for_alive_lives_only_while_its_raylet_answers(said_goodbye):
    seen = {answer: judge(answer, alive=True, said_goodbye=said_goodbye) for answer in Knock}
    assert seen == {
        Knock.ANSWERED: Standing.LIVES,
        Knock.REFUSED: Standing.CUT_OFF,  # its raylet has just gone; the head will notice
        Knock.SILENCE: Standing.CUT_OFF,
    }


def test_a_node_that_rays_head_gave_up_is_gone_only_once_the_host_says_that_it_has_no_raylet():
    seen = {answer: judge(answer, alive=False, said_goodbye=False) for answer in Knock}
    assert seen == {
        Knock.ANSWERED: Standing.CUT_OFF,  # it was cut off for too long, and is about to learn it
        Knock.REFUSED: Standing.GONE,
        Knock.SILENCE: Standing.CUT_OFF,
    }


def test_a_node_that_said_goodbye_may_be_switched_off_afterwards():
    assert judge(Knock.SILENCE, alive=False, said_goodbye=True) is Standing.GONE
    assert judge(Knock.ANSWERED, alive=False, said_goodbye=True) is Standing.CUT_OFF, "it is still on its way out"


def test_a_knock_tells_a_raylet_from_a_host_without_one_and_from_silence(monkeypatch):
    with socket.socket() as raylet:
        raylet.bind(("127.0.0.1", 0))
        port = raylet.getsockname()[1]
        raylet.listen(0)
        assert knock("127.0.0.1", port) is Knock.ANSWERED
        # Nobody accepts: once the queue is full, the kernel drops what comes.
        monkeypatch.setattr(node_liveness, "KNOCK_TIMEOUT_S", 0.2)
        answers = [knock("127.0.0.1", port) for _ in range(4)]
        assert answers[-1] is Knock.SILENCE
    assert knock("127.0.0.1", port) is Knock.REFUSED
