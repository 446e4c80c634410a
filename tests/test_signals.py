"""The first Ctrl-C or SIGTERM calls the handler, the second one has its usual effect, and ranks ignore repetitions."""

from __future__ import annotations

import os
import signal

import pytest

from movq_cli import signals
from movq_cli.errors import InterruptedRunError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_calls_the_handler_and_the_second_ends_the_block(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)
    calls: list[int] = []
    try:
        with pytest.raises(KeyboardInterrupt), signals.on_stop_signal(lambda: calls.append(1), launched=False):
            os.kill(os.getpid(), number)
            assert calls == [1]
            os.kill(os.getpid(), number)
        assert calls == [1]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_signals_that_a_launcher_repeats_are_ignored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    calls: list[int] = []
    with signals.on_stop_signal(lambda: calls.append(1), launched=True):
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert calls == [1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_exception_of_the_handler_is_raised_in_the_block() -> None:
    def stop() -> None:
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), signals.on_stop_signal(stop, launched=False):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was not handled")


def test_an_interrupted_command_says_how_to_resume() -> None:
    with (
        pytest.raises(
            InterruptedRunError,
            match=r"interrupted; the codes encoded so far are kept\. Run the same command again to resume\.",
        ),
        signals.interruptible("the codes encoded", launched=False),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was not handled")
