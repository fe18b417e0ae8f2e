"""The identity of a model: nodes work together when their fingerprints are equal.

The fingerprint is a SHA-256 over the fields of the config that change what the weights mean, and
over the weights: for a checkpoint in a single file, the SHA-256 of that file; for a sharded one,
its index (which tensor is in which file, and the size in all) and *not* the shards, since a
volunteer holds only those of its own span. Two fine-tunes of one sharded model therefore share a
fingerprint; pinning every shard's content is the manifest's business.
"""

import hashlib
import json
from typing import Any

from ..protocol.errors import ModelError
from .weights import Weights


def compute_fingerprint(architecture: dict[str, Any], weights: Weights) -> str:
    """64 hexadecimal digits. Reads the whole file of a checkpoint that has only one."""
    identity = {"architecture": architecture, "weights": _weights_identity(weights)}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _weights_identity(weights: Weights) -> dict[str, Any]:
    if weights.index is not None:
        metadata = weights.index.get("metadata")
        return {
            "index": weights.index["weight_map"],
            "total_size": metadata.get("total_size") if isinstance(metadata, dict) else None,
        }
    (filename,) = weights.filenames
    path = weights.path(filename)
    try:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
