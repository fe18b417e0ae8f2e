"""The one thread of the benchmark on which torch computes, for us and for our rivals alike.

Whoever runs torch first in a process gets the threads of its libraries: on any other thread, MKL's
batched products then use one core, and OpenMP's pool waits longer.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from petals.inference.torch_thread import TorchThread

P = ParamSpec("P")
T = TypeVar("T")

TORCH = TorchThread()


def on_torch_thread(function: Callable[P, T]) -> Callable[P, T]:
    """Run every call of ``function`` there, and wait for it."""

    @functools.wraps(function)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        if threading.current_thread().name == "petals-torch":
            return function(*args, **kwargs)
        return TORCH.run(lambda: function(*args, **kwargs)).result()

    return there
