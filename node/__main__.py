"""Where the process of the command line starts: ``petals-node`` and ``python -m petals.node``.

Rules of this file: nothing heavy is imported before the environment is set, because torch reads
it once, when it is imported.
"""

import sys


def main() -> None:
    """Run the command line and end the process with its exit code."""
    from .environment import prepare_to_compute

    prepare_to_compute(restart=sys.argv[1:2] in (["run"], ["api"]))
    from .cli.app import run_command_line

    sys.exit(run_command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
