"""Where the process of the command line starts: ``petals-node`` and ``python -m petals.node``.

Rules of this file: nothing heavy is imported before the environment is set, because torch and the
C library read it once.
"""

import os
import sys

_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def main() -> None:
    """Run the command line and end the process with its exit code."""
    # Whoever set one of these on purpose keeps their setting.
    # OpenMP's idle threads spin by default; with several nodes on one machine that costs most of
    # the speed. Not to spin at all costs a tenth of it: so, some 50 µs, which is longer than most
    # pauses between two operations.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    if sys.argv[1:2] == ["run"] and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        # Weights in huge pages are read a tenth faster. The C library reads this when a program
        # starts, so start again; a C library that doesn't know it ignores it.
        os.environ["GLIBC_TUNABLES"] = _HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - ourselves
    from .cli import failures, logs
    from .cli.app import run_command_line

    logs.set_up(everything=failures.debugging())
    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
