"""A signal that a call or HTTP asks to be followed: what it means, and what is refused."""

import numpy as np
import pytest
from pydantic import ValidationError

from pals_ray.config.operator_requests import FollowRequest, followed
from pals_ray.config.reader import ConfigError
from pals_ray.control.budget.regulation import Signal

WATTS = {"base_w": 1000, "range_w": 150, "ceiling_w": 1200}


def test_values_without_times_come_every_two_seconds():
    plan = FollowRequest(value=(0.5, -0.5, 1.0), **WATTS).plan()
    assert (plan.time_s, plan.value) == ((0, 2, 4), (0.5, -0.5, 1.0))
    assert plan.following.target_w(0.5) == 1075


def test_a_signal_in_memory_keeps_its_times():
    plan = followed(Signal(np.array([0.0, 3.0]), np.array([0.1, 0.2])), **WATTS)
    assert (plan.time_s, plan.value) == ((0, 3), (0.1, 0.2))
    assert plan.signal().at(3.5) == 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_w": -5}, "greater than 0"),
        ({"base_w": float("nan")}, "base_w"),
        ({"range_w": 1000}, "goes down to nothing"),
        ({"range_w": -1}, "range_w"),
        ({"ceiling_w": 900}, "under the base of 1000 W"),
        ({"value": (0.5, 1.5)}, "value.1"),
        ({"value": (0.5,)}, "two at least"),
        ({"value": (0.5, 0.5), "time_s": (3.0, 3.0)}, "must increase"),
        ({"value": (0.5, 0.5), "time_s": (3.0,)}, "one value for each time"),
        ({"watts": 5}, "watts"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(changes, says):
    with pytest.raises(ValidationError, match=says):
        FollowRequest(**{"value": (0.0, 0.1), **WATTS, **changes})


def test_a_call_says_it_in_one_message_of_ours():
    with pytest.raises(ConfigError, match="cannot be followed like that") as refused:
        followed(Signal(np.array([0.0, 3.0]), np.array([0.1, 0.2])), base_w=1000, range_w="lots", ceiling_w=900)
    assert "range_w" in str(refused.value)
