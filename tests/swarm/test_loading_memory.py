"""A node that loads its span never has more in memory than the span and the largest tensor.

Its peak is what the operating system counts (VmHWM), mapped pages of files included. What Python, torch
and the network take is not the span's: it is the peak of a node that serves a tiny model.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from petals.inference.checkpoint import open_checkpoint
from safetensors.torch import load_file
from support.processes import ProcessSwarm, ServingNode, swarm
from support.tiny_gguf import write_llama
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, INNER, BLOCKS = 1024, 4096, 4
SPAN = "1:4"
"""One block stays in the file."""
WEIGHTS = 3 * (3 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
LARGEST = HIDDEN * INNER
SLACK = 16 * 2**20
"""What the C library keeps of what is free, more or less. Measured: up to 7 MiB."""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        yield running


@pytest.fixture(scope="module")
def without_weights(processes: ProcessSwarm, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak of a node whose blocks are nearly nothing."""
    path = write_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", blocks=BLOCKS)
    return peak(serve(processes, path))


def serve(processes: ProcessSwarm, model: Path) -> ServingNode:
    """The second node that serves a model: the first one measured the machine, and others remember.

    What is measured takes the cache of 32 sessions, once the blocks are loaded.
    """
    open_checkpoint(model)  # else one of them tries a model of the kind
    options = ("--dtype", "float32", "--throughput", "100")
    [first] = processes.serve(model, SPAN, options=options)
    first.process.send_signal(signal.SIGTERM)
    first.process.wait()
    [node] = processes.serve(model, SPAN, options=options)
    return node


def peak(node: ServingNode) -> int:
    """The most bytes that a process has ever had resident."""
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def written(folder: Path, layout: str) -> Path:
    """A Llama as ``layout``; what ``--model`` takes for it."""
    if layout == "gguf":
        path, kind = folder / "model.gguf", GGMLQuantizationType.Q8_0
        return write_llama(path, kind, hidden=HIDDEN, inner=INNER, blocks=BLOCKS, vocabulary=1024)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    (model.half() if layout == "float16" else model).save_pretrained(folder)
    if layout == "bin":
        path = folder / "model.safetensors"
        torch.save(load_file(path), folder / "pytorch_model.bin")
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("layout", "bytes_each"), [("safetensors", 4), ("float16", 2), ("bin", 4), ("gguf", 4)]
)
def test_a_node_peaks_at_its_span_and_the_largest_tensor(
    layout: str, bytes_each: int, processes: ProcessSwarm, without_weights: int, tmp_path: Path
) -> None:
    node = serve(processes, written(tmp_path, layout))
    taken = peak(node) - without_weights
    assert taken < (WEIGHTS + LARGEST) * bytes_each + SLACK, f"{taken / 2**20:.0f} MiB"
