"""How much of a model this machine can hold: blocks, and KV cache beside them."""

import torch

from .checkpoint import Checkpoint
from .device import free_memory
from .precision import Precision

_USABLE = 0.8
"""Of the memory that is free; the rest is for activations, the ends, and other programs."""
_LEAST_CACHE_TOKENS = 8192
"""Cache that comes with every block: four sessions of BLOOM's full length."""
_MOST_CACHE_TOKENS = 65_536
"""More than this is never taken unasked, however small the model."""


def blocks_that_fit(checkpoint: Checkpoint, precision: Precision, device: torch.device) -> int:
    """How many blocks of ``checkpoint`` fit into the free memory, with cache to serve them.

    At least 0, at most all of them.
    """
    token = checkpoint.cache_shape(precision, device).bytes_per_token
    block = checkpoint.block_bytes(precision, device) + _LEAST_CACHE_TOKENS * token
    return min(checkpoint.num_blocks, int(free_memory(device) * _USABLE) // block)


def default_cache_tokens(
    checkpoint: Checkpoint, num_blocks: int, precision: Precision, device: torch.device
) -> int:
    """A KV cache budget for a node that is about to load ``num_blocks``, in tokens.

    Half of what the blocks leave, within bounds: memory is taken as tokens come, and other nodes
    may share the machine.
    """
    token = checkpoint.cache_shape(precision, device).bytes_per_token * num_blocks
    blocks = checkpoint.block_bytes(precision, device) * num_blocks
    left = (int(free_memory(device) * _USABLE) - blocks) // 2
    return max(checkpoint.max_length, min(_MOST_CACHE_TOKENS, left // token))
