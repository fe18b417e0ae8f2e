"""A process that loads one block and runs it: its memory is its own to be measured.

Started by ``worker.py`` with a model's folder and a mode; writes what loading took as a line
of JSON, and then, for each line of JSON on its input, how long steps take. Linux only.
"""

from __future__ import annotations

import json
import pathlib
import sys
import threading
import time
from typing import Any

from petals.protocol.span import Span

from .local import Local, LocalSession, Mode

STATUS = pathlib.Path("/proc/self/status")
RESET_PEAK = "5"
"""To ``clear_refs``: the high-water mark begins anew (proc(5))."""
INTERVAL = 0.005
FIRST_STEPS = 64
"""In which our kernels find out how this memory is read fastest; few beside what a node computes."""


def main() -> None:
    """Load, tell, and obey until the input ends."""
    folder, dtype, quantization = sys.argv[1:]
    pathlib.Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = memory()
    watch = AnonymousPeak()
    begin = time.perf_counter()
    with Local(folder, Mode(dtype, quantization), span=Span(0, 1)) as local:
        seconds = time.perf_counter() - begin
        tell(
            seconds=seconds,
            peak=memory()["VmHWM"] - before["VmRSS"],
            anonymous_peak=watch.stop() - before["RssAnon"],
            held=memory()["RssAnon"] - before["RssAnon"],
            cache_bytes=local.blocks.cache_shape.bytes_per_token,
        )
        session = local.open(4096)
        decode(session, length=1, steps=FIRST_STEPS)
        for line in sys.stdin:
            tell(seconds=decode(session, **json.loads(line)))


def decode(session: LocalSession, *, length: int, steps: int) -> float:
    """Seconds a step behind ``length`` tokens of noise."""
    session.length = min(session.length, length)
    session.fill(length)
    return session.decode_blocks(steps)


def tell(**figures: Any) -> None:
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def memory() -> dict[str, int]:
    """This process's memory in bytes, by the kernel's names."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


class AnonymousPeak:
    """The most memory that was our own and no view of a file, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._peak = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The most so far."""
        self._stopping.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stopping.wait(INTERVAL):
            self._peak = max(self._peak, memory()["RssAnon"])


if __name__ == "__main__":
    main()
