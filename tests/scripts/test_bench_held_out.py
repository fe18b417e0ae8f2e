"""Held-out text judges hidden states."""

import pytest
import torch
from bench_parts.held_out import SEQUENCE, held_out_rows, judge
from bench_parts.local import FLOAT32
from bench_parts.quantization import over_hops, through
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.protocol.span import Span
from petals.protocol.tensor import DType


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo")


def test_rows_follow_one_another_by_a_token_that_is_read_twice(checkpoint: Checkpoint) -> None:
    rows = held_out_rows(checkpoint, 1000)
    assert 20 < len(rows) < 1000 and rows.shape[1] == SEQUENCE + 1
    assert torch.equal(rows[:-1, -1], rows[1:, 0])


def test_the_demo_model_reads_text_that_it_has_not_seen(checkpoint: Checkpoint) -> None:
    rows = held_out_rows(checkpoint, 2)
    ends = checkpoint.load_ends("float32")
    reference = through(Span(0, checkpoint.num_blocks), FLOAT32, DType.FLOAT32, ends, rows)
    exact = judge(ends, reference, reference, rows)
    assert (exact.rms_error, exact.max_error, exact.agreement) == (0, 0, 1)
    assert exact.perplexity < 100, "chance is 4,096"
    for dtype, most in ((DType.FLOAT32, 1e-4), (DType.FLOAT16, 0.01), (DType.INT8, 0.1)):
        found = judge(ends, over_hops(dtype, ends, rows), reference, rows)
        assert found.mean_error <= found.rms_error <= min(most, found.max_error)
        assert found.agreement > 0.9


def test_noise_is_told_from_the_model(checkpoint: Checkpoint) -> None:
    rows = held_out_rows(checkpoint, 1)
    ends = checkpoint.load_ends("float32")
    generator = torch.Generator().manual_seed(0)
    shape = (1, SEQUENCE, checkpoint.hidden_size)
    one, other = (torch.randn(shape, generator=generator) for _ in range(2))
    found = judge(ends, one, other, rows)
    assert found.rms_error == pytest.approx(2**0.5, rel=0.05)
    assert found.agreement < 0.1
    assert found.perplexity > 1000
