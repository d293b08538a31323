"""Signals that end a run: they are noted, the work in hand is finished, and a checkpoint is written."""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on the signal that the terminal or the scheduler has sent to all processes already.
SECONDS_OF_ONE_SIGNAL = 5
# Set by accelerate's and torch's launchers for the processes that they start.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class Stopped(BaseException):
    """Ends the run as the signal asks; not an error, so that no handler of errors keeps the run going."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class StopRequest:
    """Whether a signal has asked this process to end.

    Attributes:
        number: the signal; 0 until one arrives.
    """

    def __init__(self):
        self.number = 0


@contextmanager
def noted() -> Iterator[StopRequest]:
    """Notes signals, and the end of the launcher, for the length of a `with` block; a second one ends at once.

    A thread takes them: Python's own handlers would wait for a kernel or a collective operation that hangs.
    """
    request = StopRequest()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
    thread = threading.Thread(target=_listen, args=(request, reader, launcher), daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


@contextmanager
def ending_at_once(message: str) -> Iterator[None]:
    """Ends this process with a message at the first signal within a `with` block that has nothing to save."""

    def end(number: int, _) -> None:
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())  # print could be in the middle of a line
        os._exit(128 + number)  # threads may still be waiting for the network

    handlers = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore(_worker: int = 0) -> None:
    """Makes a worker process of a data loader leave signals to its parent, which ends it when it needs it no longer.

    A terminal and Slurm send a signal to all processes; a worker that died would tear its parent out of an update.
    """
    signal.set_wakeup_fd(-1)  # inherited: it would report to the parent
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _listen(request: StopRequest, reader: socket.socket, launcher: int | None) -> None:
    first = 0.0
    while True:
        is_ready, _, _ = select.select([reader], [], [], None if launcher is None else 1)
        number = reader.recv(1) if is_ready else b""
        if is_ready and not number:  # closed
            return
        if number and number[0] in SIGNALS:
            number = number[0]
            if request.number and time.monotonic() > first + SECONDS_OF_ONE_SIGNAL:
                _say(f"{signal.Signals(number).name} again: ends at once")
                os._exit(128 + number)
        elif launcher is not None and os.getppid() != launcher:
            number, launcher = signal.SIGTERM, None
            if not request.number:
                _say("the launcher of this process is gone: ends as by SIGTERM")
        else:
            continue
        if not request.number:
            first, request.number = time.monotonic(), int(number)
            _say(f"{signal.Signals(number).name}: finishes the work in hand; a second signal ends at once")


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{message}", file=sys.stderr, flush=True)
