"""The first Ctrl-C or SIGTERM is heard, the second one works as ever, and a launcher's repetitions are not heard."""

from __future__ import annotations

import os
import signal

import pytest

from movq_cli import signals
from movq_cli.errors import InterruptedRunError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_heard_and_the_second_ends_the_block(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)
    heard: list[int] = []
    try:
        with pytest.raises(KeyboardInterrupt), signals.on_stop_signal(lambda: heard.append(1), launched=False):
            os.kill(os.getpid(), number)
            assert heard == [1]
            os.kill(os.getpid(), number)
        assert heard == [1]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_what_a_launcher_repeats_is_not_heard() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    heard: list[int] = []
    with signals.on_stop_signal(lambda: heard.append(1), launched=True):
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert heard == [1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_exception_comes_up_in_the_block() -> None:
    def stop() -> None:
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), signals.on_stop_signal(stop, launched=False):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not heard")


def test_a_command_that_can_be_gone_on_with_says_so() -> None:
    with (
        pytest.raises(InterruptedRunError, match=r"interrupted; the codes encoded so far are kept\. The same command"),
        signals.interruptible("the codes encoded", launched=False),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not heard")
