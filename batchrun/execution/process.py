"""An object in a process of its own: what crashes or hangs there is an error here."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import Any

from batchrun.errors import BatchrunError
from batchrun.execution.worker import WorkerLost
from batchrun.request import Requests
from batchrun.schedule.step import Step, StepOutput

_PATIENCE = 5.0  # seconds to end by itself


class Remote:
    """Calls methods of an object that lives in another process, in order.

    Args:
        build: makes the object, there; a function of a module, with arguments that can be pickled.
        timeout: seconds that a call may take before the process counts as hung.
    """

    def __init__(self, build: Callable[[], Any], *, timeout: float) -> None:
        self._build = build
        self._timeout = timeout
        self._start()

    def _start(self) -> None:
        try:
            self._open()
        except OSError as error:  # too many processes or open files, or no memory for another
            raise WorkerLost(f"no process can be started: {error.strerror or error}") from error

    def _open(self) -> None:
        here, there = socket.socketpair()
        # A Python of its own: a fork of a process that has threads or a GPU is not sound, and multiprocessing would run
        # the script that this one was started with once more. In a session of its own, as a Ctrl-C at the terminal is
        # for this process to act on; what it prints by mistake is kept off standard output.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({there.fileno()})"
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[there.fileno()],
                start_new_session=True,
            )
        self._here = Connection(here.detach())
        self._here.send(self._build)

    def send(self, method: str, *args: Any) -> None:
        """Have a method called, and do not wait for it; `receive` gives what it returns.

        Raises:
            WorkerLost: the process is gone.
        """
        try:
            self._here.send((method, args))
        except OSError:
            raise self._end() from None

    def receive(self, *, patient: bool = False) -> Any:
        """What the oldest call returned that was not received yet.

        Args:
            patient: whether to wait as long as it takes.

        Raises:
            BatchrunError: as the method raised.
            WorkerLost: the process is gone, or hangs, or the method raised anything else.
        """
        try:
            if not self._here.poll(None if patient else self._timeout):
                self.kill()
                raise WorkerLost(f"the worker has not answered for {self._timeout:g} s")
            value, error, logged = self._here.recv()
        except (EOFError, ConnectionError):
            raise self._end() from None
        for record in logged:
            logging.getLogger(record.name).handle(record)
        if isinstance(error, BatchrunError):
            raise error
        if error is not None:
            self.kill()
            raise WorkerLost(error)
        return value

    def call(self, method: str, *args: Any, patient: bool = False) -> Any:
        """`send` and `receive`."""
        self.send(method, *args)
        return self.receive(patient=patient)

    def restart(self) -> None:
        """A new process, in place of this one."""
        self.kill()
        self._start()

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._here.close()

    def _end(self) -> WorkerLost:
        """How the process ended."""
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            return WorkerLost("the worker closed its connection")
        if code >= 0:
            return WorkerLost(f"the worker ended with exit code {code}")
        killed = -code == signal.SIGKILL
        words = " (what the system does when memory runs out)" if killed else ""
        return WorkerLost(f"the worker was ended by {signal.Signals(-code).name}{words}", killed=killed)


class RemoteEngine:
    """An engine in a process of its own; the methods are those of `engine.Engine`.

    Args:
        build: makes the engine.
        step_timeout: seconds that a step may take before the process counts as hung; loading takes what it takes.
    """

    def __init__(self, build: Callable[[], Any], *, step_timeout: float) -> None:
        self._remote = Remote(build, timeout=step_timeout)
        self._remote.send("load")  # while other things are done here
        self._loading = True
        self._unread = 0  # submitted steps whose taking was not confirmed yet
        self._started: tuple[Any, ...] = ()

    def load(self) -> None:
        """Wait until the model is loaded."""
        if self._loading:
            self._remote.receive(patient=True)
            self._loading = False

    def kv_memory(self, share: float, rows: int, page_size: int) -> int | None:
        found: int | None = self._remote.call("kv_memory", share, rows, page_size)
        return found

    def start(
        self,
        requests: Requests,
        eos_token_ids: frozenset[int],
        page_size: int,
        num_pages: int,
        vocabulary: Sequence[bytes] | None = None,
    ) -> None:
        self._started = requests.for_sampling(), eos_token_ids, page_size, num_pages, vocabulary
        self._remote.call("start", *self._started)

    def submit(self, step: Step) -> None:
        self._confirm()  # a process that hangs would not read, and sending would hang here
        self._remote.send("submit", step)
        self._unread += 1

    def collect(self) -> StepOutput:
        self._confirm()
        output: StepOutput = self._remote.call("collect")
        return output

    def restart(self) -> None:
        self._unread = 0
        self._remote.restart()
        self._remote.call("load", patient=True)
        self._remote.call("start", *self._started)

    def close(self) -> None:
        self._remote.kill()  # it has nothing to put in order

    def _confirm(self) -> None:
        while self._unread:
            self._remote.receive()
            self._unread -= 1


class _Kept(QueueHandler):
    """Keeps what is logged, until it goes to the process that has the log."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.records: list[logging.LogRecord] = []

    def enqueue(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def serve(descriptor: int) -> None:
    """The other process: calls what it is told to, until nobody is there to tell. What is logged here goes there with
    the next answer."""
    faulthandler.enable()
    kept = _Kept()
    ours = logging.getLogger("batchrun")
    ours.addHandler(kept)
    ours.propagate = False  # or what there is no handler for is printed too
    # Who sends these to all processes means the one that started this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    there = Connection(descriptor)
    target, build = None, None
    while True:
        try:
            if build is None:
                build = there.recv()
            method, args = there.recv()
        except (EOFError, OSError):
            os._exit(0)  # at once: there is nothing to put in order
        value: Any = None
        error: BatchrunError | str | None = None
        try:
            target = target or build()
            value = getattr(target, method)(*args)
        except BatchrunError as refusal:
            error = refusal
        except Exception as failure:
            error = "".join(traceback.format_exception_only(failure)).strip()
        try:
            there.send((value, error, kept.records))
            kept.records.clear()
        except OSError:
            os._exit(0)
