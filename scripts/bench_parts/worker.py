"""A block in a process of its own, as ``large_block.py`` sees it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from types import TracebackType
from typing import Any

from .local import Mode


class Worker:
    """A process of ``block_worker.py``; gone when the block ends."""

    def __init__(self, folder: pathlib.Path, mode: Mode) -> None:
        self.mode = mode
        scripts = str(pathlib.Path(__file__).parent.parent)
        paths = [scripts, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "bench_parts.block_worker"),
                *(str(folder), mode.dtype, mode.quantization),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self.loaded: dict[str, Any] = self._answer()

    def decode(self, *, length: int, steps: int) -> float:
        """Seconds a step behind ``length`` tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"length": length, "steps": steps}) + "\n")
        self._process.stdin.flush()
        seconds: float = self._answer()["seconds"]
        return seconds

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"loading a block as {self.mode.name} failed; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer
