"""Stopping a run from outside without losing the step it is in."""

import signal
import threading


def stopped(number: int) -> BaseException:
    """What a run that a signal stopped raises. Not caught, it ends the process with 130 for SIGINT
    and 143 for SIGTERM, as shells and schedulers know them."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


class StopSignal:
    """While entered, the first SIGINT or a SIGTERM only sets `received`; a second SIGINT stops at
    once. Signals reach Python's main thread only; in another thread nothing is installed.

    SIGTERM never stops at once, because torchrun sends one after the terminal's SIGINT.
    """

    def __init__(self):
        self.received = 0
        """Number of the signal, 0 for none."""
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = self.received or number
