"""What the server makes of a reply: where its seconds went."""

from dataclasses import astuple

import pytest

from flowerbed.fleet import Times, divide

METRICS = {"queue-seconds": 0.5, "evaluate-seconds": 1.0, "train-seconds": 6.0}


@pytest.mark.parametrize(
    ("since_started", "receive", "send"),
    [
        (8.5, 1.5, 1.0),
        (11.0, 0.0, 2.5),  # the device's clock is behind
        (2.0, 2.5, 0.0),  # the device's clock is ahead
    ],
)
def test_the_parts_of_a_reply_add_up_whatever_the_clocks_say(
    since_started: float, receive: float, send: float
) -> None:
    times = divide(10.0, since_started, METRICS)
    assert times == Times(receive, 0.5, 1.0, 6.0, send)
    assert sum(astuple(times)) == 10.0


def test_what_no_clock_can_explain_is_not_negative() -> None:
    times = divide(7.0, 7.0, METRICS)
    assert (times.receive_seconds, times.send_seconds) == (0.0, 0.0)
