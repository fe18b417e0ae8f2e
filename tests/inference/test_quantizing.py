"""Rounding weights to 8 and to 4 bits."""

import torch
from petals.inference.quantizing import NF4_LEVELS, Int8Weights
from support.rounding import nearest_nf4


def test_eight_bits_are_the_nearest_integers() -> None:
    weight = torch.tensor([[1.27, -0.5, 0.014, 0.016], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rounded = Int8Weights.nearest(weight)
    assert rounded.integers.tolist() == [[127, -50, 1, 2], [0, 0, 0, 0]]
    torch.testing.assert_close(rounded.scales[0], torch.tensor(0.01))


def test_four_bits_are_the_nearest_levels_of_their_group() -> None:
    levels = torch.tensor(NF4_LEVELS)
    row = torch.cat([levels * 3, torch.zeros(48), levels * 0.2])  # 64 weights, and 16 more
    rounded = nearest_nf4(torch.stack([row, row.flip(0)]))
    assert rounded.codes.shape == (2, 80)
    torch.testing.assert_close(rounded.scales[0], torch.tensor([3.0, 0.2]))
    assert rounded.codes[0, :16].tolist() == rounded.codes[0, 64:].tolist() == list(range(16))
    assert rounded.codes[0, 16:64].unique().tolist() == [7], "nothing stays nothing"
