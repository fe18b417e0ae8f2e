"""What of the log reaches standard error, which is for people: our warnings, not libraries'."""

import logging
import warnings

_LIBRARIES = ("libp2p", "multiaddr", "transformers", "huggingface_hub", "httpx")


def set_up(*, everything: bool) -> None:
    """Show our warnings; with ``everything``, show what all libraries say."""
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(format="petals-node: %(levelname)s %(name)s: %(message)s")
    root.setLevel(logging.INFO if everything else logging.WARNING)
    for name in _LIBRARIES:
        # Their errors come back to us as exceptions, which are told in our words.
        logging.getLogger(name).setLevel(logging.INFO if everything else logging.CRITICAL)
    if not everything:
        warnings.simplefilter("ignore")
