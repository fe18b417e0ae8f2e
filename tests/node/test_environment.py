"""What torch and its libraries are told before they start, and that they listen."""

import os
import subprocess
import sys

import pytest
from petals.node import environment

PRODUCTS = """
from petals.node.environment import prepare_to_compute
prepare_to_compute(restart=False)
import psutil, torch
from petals.inference.kernels import Reordered

product = Reordered(torch.randn(64, 64), None)

def memory_after(counts):
    with torch.inference_mode():
        for rows in counts:
            product(torch.randn(rows, 64))
    return psutil.Process().memory_info().rss / 2**20

full = memory_after(range(1, 150))
print(memory_after(range(150, 350)) - full)
"""
FLAT_MIB = 40.0
"""Measured: 8; 113 where oneDNN keeps all that it makes."""


def test_who_sets_something_on_purpose_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.TORCH_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    environment.prepare_to_compute(restart=False)
    told = {name: os.environ[name] for name in environment.TORCH_SETTINGS}
    assert told == environment.TORCH_SETTINGS | {"LRU_CACHE_CAPACITY": "7"}


@pytest.mark.slow
def test_memory_does_not_grow_with_every_count_of_rows() -> None:
    inherited = {k: v for k, v in os.environ.items() if k not in environment.TORCH_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PRODUCTS],
        env=inherited | {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": environment.MEMORY_TUNABLES},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < FLAT_MIB
