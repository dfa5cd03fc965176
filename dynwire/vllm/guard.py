"""Ends vLLM's engine when the worker that started it is gone.

vLLM's engine runs in processes of its own that do not notice the death of their parent: after a SIGKILL they would keep the
model, and the GPU's memory. So the worker starts this module as a further process, and tells it their ids. It waits for the end
of its standard input, which comes when the worker has closed it or has died, and then kills what is left of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


class Guard:
    """The worker's end of a guard process."""

    def __init__(self) -> None:
        # a session of its own: signals that a terminal sends to all are not meant for it
        self._process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, start_new_session=True)
        self._known: set[int] = set()

    def watch(self, pid: int) -> None:
        """A process that must not outlive this one. May be said again."""
        assert self._process.stdin is not None
        if pid not in self._known:
            self._known.add(pid)
            self._process.stdin.write(b"%d\n" % pid)
            self._process.stdin.flush()

    def close(self) -> None:
        """Kill what still runs of the processes, and wait for the guard to end."""
        self._process.communicate()


def main() -> None:
    handles = []
    for line in sys.stdin:
        try:
            # a handle keeps meaning the same process when its number is used again
            handles.append(os.pidfd_open(int(line)))
        except ProcessLookupError:
            continue
    for handle in handles:
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
