"""What of the log reaches standard error, and how it looks there: for people, or for programs.

Our own warnings, unless more is asked for. Libraries are heard when all is: their errors come back to
us as exceptions, which are told in our words.
"""

import json
import logging
import sys
import warnings
from datetime import UTC, datetime
from typing import TextIO

from ...protocol.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
DEFAULT_LEVEL = "warning"
FORMATS = ("text", "json")
DEFAULT_FORMAT = "text"

_LIBRARIES = ("libp2p", "multiaddr", "transformers", "huggingface_hub", "httpx")


class _ToStandardError(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment: above the bars, where some are drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_handler = _ToStandardError()
"""Ours; how it writes is set anew whenever that becomes known."""


def set_up(*, level: str = DEFAULT_LEVEL, form: str = DEFAULT_FORMAT) -> None:
    """Show what is at least of ``level``. Raises ConfigError."""
    for value, known, option in ((level, LEVELS, "log-level"), (form, FORMATS, "log-format")):
        if value not in known:
            raise ConfigError(f"--{option}: {value!r} is none of {', '.join(known)}")
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_handler)
    _handler.setFormatter(
        JsonFormatter()
        if form == "json"
        else logging.Formatter("petals-node: %(levelname)s %(name)s: %(message)s")
    )
    everything = level == "debug"
    # Python's own debugging messages, of every library, are nobody's; ours are.
    root.setLevel(logging.INFO if everything else level.upper())
    logging.getLogger(__name__.partition(".")[0]).setLevel(level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO if everything else logging.CRITICAL)
    if not everything:
        warnings.simplefilter("ignore")


def complain(line: str) -> None:
    """Say why a command ends, as the log would."""
    if isinstance(_handler.formatter, JsonFormatter):
        record = logging.LogRecord(__name__, logging.ERROR, "", 0, "%s", (line,), None)
        line = _handler.formatter.format(record)
    else:
        line = f"petals-node: {line}"
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging's."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)
