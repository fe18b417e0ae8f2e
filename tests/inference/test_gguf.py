"""GGUF files: what transformers makes of them, read one tensor at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from petals.inference.checkpoint import open_checkpoint
from petals.inference.sampling_params import SamplingParams
from petals.protocol.errors import ModelError
from petals.protocol.span import Span
from support.engines import generate, serving
from support.tiny_families import greedy
from support.tiny_gguf import VOCABULARY, write_llama
from transformers import AutoModelForCausalLM

PROMPTS = [[5, 6, 7, 8, 90, 91], [9], [3, 4, 20, 30, 40, 50]]


@pytest.mark.parametrize(
    "kind",
    [
        GGMLQuantizationType.F32,
        GGMLQuantizationType.F16,
        GGMLQuantizationType.BF16,
        GGMLQuantizationType.Q8_0,
        GGMLQuantizationType.Q4_1,
    ],
)
def test_its_tokens_are_those_of_transformers(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    path = write_llama(tmp_path / "tiny.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.num_blocks, checkpoint.vocab_size, checkpoint.max_length) == (
        3,
        VOCABULARY,
        256,
    )
    with serving(checkpoint, Span(0, 2), Span(2, 3)) as engines:
        params = SamplingParams(max_new_tokens=10)
        tokens = generate(engines, checkpoint.load_ends(), PROMPTS, params)
    assert tokens == greedy(model, PROMPTS, 10)


def test_the_fingerprint_is_of_the_file(tmp_path: Path) -> None:
    one, other = write_llama(tmp_path / "1.gguf"), write_llama(tmp_path / "2.gguf")
    assert open_checkpoint(one).fingerprint == open_checkpoint(other).fingerprint
    other.write_bytes(other.read_bytes()[:-1] + b"\x07")
    assert open_checkpoint(one).fingerprint != open_checkpoint(other).fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama__rope__scaling__type": "linear"}, r"llama\.rope\.scaling\.type is linear"),
        ({"llama__expert_count": 8}, r"llama\.expert_count is 8"),
        ({"split__count": 3}, "one of several parts"),
    ],
)
def test_what_would_be_passed_over_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = write_llama(tmp_path / "tiny.gguf", **fields)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_what_does_not_scale_is_said_with_none(tmp_path: Path) -> None:
    open_checkpoint(write_llama(tmp_path / "tiny.gguf", llama__rope__scaling__type="none"))


@pytest.mark.parametrize("keep", [0, 3, 20, 500, -100])
def test_a_cut_off_file(tmp_path: Path, keep: int) -> None:
    path = write_llama(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        open_checkpoint(path)


def test_a_file_that_changes_under_a_running_node(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf")
    ends = open_checkpoint(path).load_ends()
    path.touch()
    with pytest.raises(ModelError, match="has changed since it was opened"):
        ends.embed(torch.tensor([[1]]))


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match="or a GGUF file"):
        open_checkpoint(tmp_path / "notes.txt")
