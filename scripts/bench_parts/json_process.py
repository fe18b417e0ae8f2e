"""A process of the benchmark's own, with which it talks in lines of JSON."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from types import TracebackType
from typing import Any, Self


class JsonProcess:
    """A process of ours that answers lines of JSON; gone when the block ends."""

    def __init__(self, module: str, *arguments: str) -> None:
        scripts = str(pathlib.Path(__file__).parent.parent)
        paths = [scripts, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"bench_parts.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Tell it something, and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark has ended; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer
