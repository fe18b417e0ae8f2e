"""Every family, whatever its config says: cut, batched and cut short, its tokens are transformers'.

Windows are of six tokens, and all texts are longer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from petals.inference.attention import LaneRows
from petals.inference.cache import LaneCache
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.engine import Engine, Limits
from petals.inference.experts import Experts
from petals.inference.linear import Linear
from petals.inference.model import Ends
from petals.inference.sampling_params import SamplingParams
from petals.inference.tensors import to_torch, to_wire
from petals.inference.torch_thread import TorchThread
from petals.protocol.errors import ModelError
from petals.protocol.prefix import PREFIX_ROWS
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor
from support.engines import Chain, generate, serving
from support.tiny_families import CONFIGS, NAMED, greedy, tiny_config, tiny_model

PROMPTS = [
    [5, 6, 7, 8, 90, 91],
    [9],
    [3, 4, 20, 30, 40, 50, 60, 70, 80, 33, 44, 55, 66, 77],
    [1, 2],
]
NEW = 10
GREEDY = SamplingParams(max_new_tokens=NEW)
SPANS = Span(0, 1), Span(1, 4)
each_family = pytest.mark.parametrize("tiny", NAMED, indirect=True, scope="module")
ALIKE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}


@dataclass(frozen=True)
class Tiny:
    """A model of a family, as transformers and as two hops have it."""

    model: Any
    checkpoint: Checkpoint
    ends: Ends
    engines: list[Engine]

    def expected(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits behind the last of ``tokens``."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([tokens])).logits[0, -1]
        return logits


@pytest.fixture(scope="module")
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(tiny_config(request.param), folder)
    checkpoint = open_checkpoint(folder, tried=True)
    thread, limits = TorchThread(), Limits(prefill_rows=5)
    engines = [
        Engine(
            checkpoint.load_blocks(span, "float32", "cpu"),
            cache_tokens=4096,
            limits=limits,
            thread=thread,
        )
        for span in SPANS
    ]
    yield Tiny(model, checkpoint, checkpoint.load_ends("float32", "cpu"), engines)
    assert thread.shutdown(timeout=60)


def run(engine: Engine, session: bytes, position: int, hidden: WireTensor, **options: Any) -> Any:
    """A step's future."""
    return engine.submit(
        session,
        position=position,
        hidden=hidden,
        wire_dtype=DType.FLOAT32,
        span=engine.blocks.span,
        **options,
    )


@pytest.mark.parametrize("tiny", CONFIGS, indirect=True, scope="module")
def test_a_batch_in_chunks(tiny: Tiny) -> None:
    tokens = generate(tiny.engines, tiny.ends, PROMPTS, GREEDY, chunk=4)
    assert tokens == greedy(tiny.model, PROMPTS, NEW)


@each_family
def test_without_native_code_it_is_the_same(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petals.inference.attention.native", lambda: None)
    tokens = generate(tiny.engines, tiny.ends, PROMPTS, GREEDY)
    assert tokens == greedy(tiny.model, PROMPTS, NEW)


@each_family
def test_sessions_at_once_share_rounds(tiny: Tiny) -> None:
    names = [bytes([number]) for number in range(len(PROMPTS))]
    texts = [list(prompt) for prompt in PROMPTS]
    for engine in tiny.engines:
        for name in names:
            engine.open(name, batch=1, max_tokens=40)
    positions = [0] * len(names)
    for _ in range(NEW):
        flows = [
            to_wire(tiny.ends.embed(torch.tensor([text[position:]])))
            for text, position in zip(texts, positions, strict=True)
        ]
        for engine in tiny.engines:
            steps = [run(engine, *of) for of in zip(names, positions, flows, strict=True)]
            flows = [step.result(timeout=60) for step in steps]
        positions = [len(text) for text in texts]
        for text, flow in zip(texts, flows, strict=True):
            text.append(int(tiny.ends.logits(to_torch(flow))[0, -1].argmax()))
    for engine in tiny.engines:
        for name in names:
            engine.close(name)
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert [text[len(prompt) :]] == greedy(tiny.model, [prompt], NEW)


@each_family
def test_going_back_and_on_otherwise(tiny: Tiny) -> None:
    ids = torch.tensor([PROMPTS[2]])
    chain = Chain(tiny.engines, tiny.ends, session_id=b"s", batch=1, max_tokens=40)
    first = chain.step(0, ids)
    chain.step(14, torch.tensor([[50, 51, 52]]))
    torch.testing.assert_close(chain.step(9, ids[:, 9:]), first[:, 9:], **ALIKE)
    logits = chain.step(10, torch.tensor([[33, 44]]))[0, -1]
    chain.close()
    torch.testing.assert_close(logits, tiny.expected([*PROMPTS[2][:10], 33, 44]), **ALIKE)


@each_family
def test_a_replacement_that_gets_all_rows_at_once_goes_on_exactly(tiny: Tiny) -> None:
    """As when a hop dies: the one in its place is replayed everything, the one before it nothing."""
    front, back = tiny.engines
    chain = Chain(tiny.engines, tiny.ends, session_id=b"s", batch=1, max_tokens=40)
    text = list(PROMPTS[2])
    text.append(int(chain.step(0, torch.tensor([text]))[0, -1].argmax()))
    for position in range(14, 17):
        text.append(int(chain.step(position, torch.tensor([text[-1:]]))[0, -1].argmax()))
    back.close(b"s")
    back.open(b"s", batch=1, max_tokens=40)
    front.open(b"replay", batch=1, max_tokens=40)
    log = run(front, b"replay", 0, to_wire(tiny.ends.embed(torch.tensor([text[:17]]))))
    run(back, b"s", 0, log.result(timeout=60)).result(timeout=60)
    for position in range(17, 20):
        text.append(int(chain.step(position, torch.tensor([text[-1:]]))[0, -1].argmax()))
    chain.close()
    front.close(b"replay")
    assert [text[14:]] == greedy(tiny.model, [PROMPTS[2]], 7)


@each_family
def test_a_prefix_computed_for_one_session_serves_another(tiny: Tiny) -> None:
    tokens = [(7 * n + n * n) % 97 for n in range(PREFIX_ROWS + 5)]
    begun = []
    for name in (b"first", b"second"):
        for engine in tiny.engines:
            engine.open(name, batch=1, max_tokens=len(tokens), prefixes=True)
        known = [
            engine.restore(name, [b"key"], wire_dtype=DType.FLOAT32, span=engine.blocks.span)
            for engine in tiny.engines
        ]
        [position] = {restored.result(timeout=60).position for restored in known}
        begun.append(position)
        keys = [] if position else [(PREFIX_ROWS, b"key")]
        flow = to_wire(tiny.ends.embed(torch.tensor([tokens[position:]])))
        for engine in tiny.engines:
            flow = run(engine, name, position, flow, keys=keys).result(timeout=60)
            engine.close(name)
        logits = tiny.ends.logits(to_torch(flow))[0, -1]
        torch.testing.assert_close(logits, tiny.expected(tokens), **ALIKE)
    assert begun == [0, PREFIX_ROWS]


@each_family
def test_int8_stays_near(tiny: Tiny) -> None:
    hidden = torch.randn((1, 20, tiny.checkpoint.hidden_size)) * 0.5
    outputs = []
    for quantization in ("none", "int8"):
        blocks = tiny.checkpoint.load_blocks(
            Span(0, 1), "float32", "cpu", quantization=quantization
        )
        lane = LaneRows(LaneCache(blocks.cache_shape, 40), 20)
        outputs.append(blocks.run(hidden, blocks.plan([lane])))
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert error < 0.2, "a row between two experts may go to the other one"


@pytest.mark.parametrize("name", ["Mixtral, window", "Qwen3-MoE, one dense block", "Granite-MoE"])
def test_experts_are_held_as_all_matrices_are(tmp_path: Path, name: str) -> None:
    tiny_model(tiny_config(name), tmp_path)
    for quantization in ("none", "int8"):
        blocks = open_checkpoint(tmp_path, tried=True).load_blocks(
            Span(0, 1), "float32", "cpu", quantization=quantization
        )
        experts = [part for part in blocks.module(0).modules() if isinstance(part, Experts)]
        assert len(experts) == 1
        linears = [part for part in experts[0].modules() if isinstance(part, Linear)]
        assert len(linears) >= 8
        assert not list(experts[0].parameters())


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("Phi3, longrope within its length, partial rotary", 64),
        ("Llama, dynamic rotary within its length", 40),
    ],
)
def test_beyond_the_length_at_which_a_rotary_embedding_changes_nothing_is_computed(
    tmp_path: Path, name: str, limit: int
) -> None:
    changes = {"max_position_embeddings": limit} if "Llama" in name else {}
    tiny_model(tiny_config(name, **changes), tmp_path)
    checkpoint = open_checkpoint(tmp_path, tried=True)
    assert checkpoint.max_length == limit
    ends = checkpoint.load_ends()
    with serving(checkpoint, Span(0, 4)) as engines:
        chain = Chain(engines, ends, session_id=b"s", batch=1, max_tokens=100)
        chain.step(0, torch.ones((1, limit), dtype=torch.int64))
        with pytest.raises(ModelError, match=f"carried for {limit} tokens"):
            chain.step(limit, torch.ones((1, 1), dtype=torch.int64))


def test_shards_under_other_names_are_found(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("Mixtral, window"), tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    checkpoint = open_checkpoint(tmp_path, tried=True)
    with serving(checkpoint, Span(0, 2), Span(2, 4)) as engines:
        tokens = generate(engines, checkpoint.load_ends(), PROMPTS, GREEDY)
    assert tokens == greedy(model, PROMPTS, NEW)
