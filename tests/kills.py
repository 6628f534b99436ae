"""A command killed with SIGKILL just before one of its writes, whichever the test wants."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def killed_before(call: int, calls: list[tuple[Any, str]], command: Callable[[], object]) -> bool:
    """Run a command in a process of its own, and kill it just before its so-manieth call.

    Args:
        calls: what counts, as the object that has it and its name, such as `(os, "fsync")`.

    Returns:
        Whether it was not killed: then it has ended by itself, by `SystemExit` at most.
    """
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        return status == 0
    counted = iter(range(10**6))

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(counted) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return wrapped

    try:
        for owner, name in calls:
            setattr(owner, name, deadly(getattr(owner, name)))
        with suppress(SystemExit):
            command()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
