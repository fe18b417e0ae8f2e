"""A block in a process of its own, as ``large_block.py`` sees it."""

from __future__ import annotations

import pathlib
from typing import Any

from .json_process import JsonProcess
from .local import Mode


class Worker(JsonProcess):
    """A process of ``block_worker.py``; gone when the block ends."""

    def __init__(self, folder: pathlib.Path, mode: Mode) -> None:
        super().__init__("block_worker", str(folder), mode.dtype, mode.quantization)
        self.mode = mode
        self.loaded: dict[str, Any] = self.answer()

    def decode(self, *, length: int, steps: int) -> float:
        """Seconds a step behind ``length`` tokens."""
        seconds: float = self.ask(length=length, steps=steps)["seconds"]
        return seconds
