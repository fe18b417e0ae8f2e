"""What torch and the C library read from the environment, once, when they start.

Whoever sets one of these on purpose keeps their setting.
"""

import os
import sys

TORCH_SETTINGS = {
    # Idle threads spin by default; with several nodes on one machine that costs most of the speed.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Not to spin at all costs a tenth of it. So, some 0.1 ms: longer than most pauses between two
    # operations.
    "GOMP_SPINCOUNT": "10000",
    # oneDNN makes code for every shape of a product, and keeps it: half a MiB for each count of rows that
    # a round has had, for each shape of matrix. It keeps a thousand, and torch's bridge to it a thousand
    # more: a node whose float32 it multiplies grew for hours, by hundreds of MiB. These are enough for the
    # rounds of some thirty sessions; what is made anew costs a round a few milliseconds.
    "LRU_CACHE_CAPACITY": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}
"""For torch and its libraries, when it is imported."""
_C_LIBRARY = "GLIBC_TUNABLES"
MEMORY_TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        # Weights in huge pages are read a tenth faster; what threads allocate in arenas of their
        # own would not be in them, and one thread alone allocates much here.
        "hugetlb": 1,
        "arena_max": 1,
        # Large blocks go back to the system when they are freed. In the heap, aligned ones of one
        # size do not always find the room of those before them: loading took twice the memory.
        "mmap_threshold": 16 * 2**20,
        # What the heap has is kept, since the next operation wants as much.
        "trim_threshold": 128 * 2**20,
    }.items()
)
"""For the C library, when a program starts."""


def prepare_to_compute(*, restart: bool) -> None:
    """Set the environment; call it before torch is imported.

    The C library reads its part when a program starts: with ``restart``, this program starts again
    in the same process if it has to, and does not return.
    """
    for name, value in TORCH_SETTINGS.items():
        os.environ.setdefault(name, value)
    if restart and sys.platform == "linux" and _C_LIBRARY not in os.environ:
        os.environ[_C_LIBRARY] = MEMORY_TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - ourselves
