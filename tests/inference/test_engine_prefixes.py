"""Sessions that begin alike share the engine's rows: exactly, and never at anybody's cost."""

import hashlib
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Any

import pytest
import torch
from petals.inference.cache import SessionCache
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.engine import Engine, Restored
from petals.inference.model import Ends
from petals.inference.tensors import to_torch, to_wire
from petals.protocol.errors import CacheFull, LocalProtocolError
from petals.protocol.prefix import PREFIX_ROWS, Label
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor
from support.engines import serving
from support.tiny_bloom import reference_tokens, save_bloom, tiny_bloom

SPANS = Span(0, 3), Span(3, 5)
ALL = Span(0, 5)
PROMPT = [(11 * n + n * n) % 97 for n in range(150)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_bloom(tmp_path_factory.mktemp("bloom")))


@pytest.fixture(scope="module")
def ends(checkpoint: Checkpoint) -> Ends:
    return checkpoint.load_ends()


@pytest.fixture
def engine(checkpoint: Checkpoint) -> Iterator[Engine]:
    with serving(checkpoint, ALL, cache_tokens=1000) as (engine,):
        yield engine


def key(span: Span, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(f"{span} {tokens}".encode()).digest()


def labels(span: Span, tokens: Sequence[int], position: int = 0) -> list[Label]:
    """What a step of the tokens from ``position`` on reaches."""
    first = position // PREFIX_ROWS + 1
    ends = range(first * PREFIX_ROWS, len(tokens) + 1, PREFIX_ROWS)
    return [(end, key(span, tokens[:end])) for end in ends]


def keys(span: Span, tokens: Sequence[int]) -> list[bytes]:
    """What a session that is to be ``tokens`` may begin with: a row is left to be computed."""
    return [key for _, key in labels(span, tokens[:-1])]


class Hop:
    """A session at one engine, as a relaying node would use it: tokens give its keys."""

    def __init__(self, engine: Engine, name: bytes, **options: Any) -> None:
        self.engine = engine
        self.name = name
        self.span = engine.blocks.span
        engine.open(name, batch=1, prefixes=True, **({"max_tokens": 200} | options))

    def restore(self, tokens: Sequence[int], **changes: Any) -> Future[Restored]:
        arguments: dict[str, Any] = {"wire_dtype": DType.FLOAT32, "span": self.span} | changes
        return self.engine.restore(self.name, keys(self.span, tokens), **arguments)

    def restored(self, tokens: Sequence[int], **changes: Any) -> Restored:
        return self.restore(tokens, **changes).result(timeout=60)

    def submit(
        self, tokens: Sequence[int], position: int, hidden: WireTensor, **changes: Any
    ) -> Future[WireTensor]:
        """Rows of ``tokens`` from ``position`` on."""
        arguments: dict[str, Any] = {
            "wire_dtype": DType.FLOAT32,
            "span": self.span,
            "keys": labels(self.span, tokens, position),
        } | changes
        return self.engine.submit(self.name, position=position, hidden=hidden, **arguments)

    def close(self) -> None:
        self.engine.close(self.name)


def embedded(ends: Ends, tokens: Sequence[int]) -> WireTensor:
    return to_wire(ends.embed(torch.tensor([tokens])))


def joined(pieces: Sequence[WireTensor]) -> WireTensor:
    return to_wire(torch.cat([to_torch(piece) for piece in pieces], dim=1))


def rows_of(wire: WireTensor, start: int, stop: int) -> WireTensor:
    return to_wire(to_torch(wire)[:, start:stop].contiguous())


def generate(
    engines: Sequence[Engine], ends: Ends, name: bytes, prompt: Sequence[int], new: int
) -> tuple[list[int], list[Restored], list[WireTensor]]:
    """Greedy tokens; what each hop began with; all outputs of each hop for the prompt."""
    hops = [Hop(engine, name) for engine in engines]
    begun = [hop.restored(prompt) for hop in hops]
    flow = embedded(ends, prompt)
    produced = []
    for hop, start in zip(hops, begun, strict=True):
        rest = rows_of(flow, start.position, len(prompt))
        output = hop.submit(prompt, start.position, rest).result(timeout=60)
        flow = joined([*([start.outputs] if start.outputs else []), output])
        produced.append(flow)
    tokens = [*prompt, int(ends.logits(to_torch(flow))[0, -1].argmax())]
    while len(tokens) < len(prompt) + new:
        flow = embedded(ends, tokens[-1:])
        for hop in hops:
            flow = hop.submit(tokens, len(tokens) - 1, flow).result(timeout=60)
        tokens.append(int(ends.logits(to_torch(flow))[0, -1].argmax()))
    for hop in hops:
        hop.close()
    return tokens[len(prompt) :], begun, produced


def test_a_session_that_begins_alike_is_exact_through_two_spans(
    checkpoint: Checkpoint, ends: Ends
) -> None:
    reference = reference_tokens(tiny_bloom(), [PROMPT], 12)[0]
    with serving(checkpoint, *SPANS, cache_tokens=1000) as engines:
        first, begun, produced = generate(engines, ends, b"first", PROMPT, 12)
        assert first == reference
        assert begun == [Restored(0, None)] * 2
        for _ in range(2):
            again, begun, reproduced = generate(engines, ends, b"again", PROMPT, 12)
            assert again == reference
            for restored, before, after in zip(begun, produced, reproduced, strict=True):
                assert restored.position == 128 and restored.outputs is not None
                assert bytes(restored.outputs.data) == bytes(rows_of(before, 0, 128).data)
                torch.testing.assert_close(to_torch(after), to_torch(before), rtol=1e-4, atol=1e-5)
        other = [*PROMPT[:70], *range(40)]
        tokens, begun, _ = generate(engines, ends, b"other", other, 12)
        assert [restored.position for restored in begun] == [64, 64]
        assert tokens == reference_tokens(tiny_bloom(), [other], 12)[0]
        for engine in engines:
            statistics = engine.statistics()
            assert (statistics.prefix_hits, statistics.prefix_tokens_reused) == (3, 2 * 128 + 64)
            assert statistics.cache_tokens_used == 0
            assert statistics.prefix_tokens == 160 + 96, "the first one is a prefix of the others"


def test_a_hop_that_holds_less_goes_on_from_its_predecessors_outputs(
    checkpoint: Checkpoint, ends: Ends
) -> None:
    with serving(checkpoint, *SPANS, cache_tokens=1000) as engines:
        generate(engines, ends, b"first", PROMPT, 1)
        engines[1].open(b"greedy", batch=1, max_tokens=1000)  # nothing is left for others
        engines[1].close(b"greedy")
        tokens, begun, _ = generate(engines, ends, b"again", PROMPT, 12)
        assert [restored.position for restored in begun] == [128, 0]
        assert tokens == reference_tokens(tiny_bloom(), [PROMPT], 12)[0]


def test_a_live_session_shares_its_rows_and_goes_on(engine: Engine, ends: Ends) -> None:
    live = Hop(engine, b"live")
    expected = live.submit(PROMPT, 0, embedded(ends, PROMPT)).result(timeout=60)
    other = Hop(engine, b"other")
    restored = other.restored(PROMPT)
    assert restored == Restored(128, rows_of(expected, 0, 128))
    rest = rows_of(embedded(ends, PROMPT), 128, 150)
    got = other.submit(PROMPT, 128, rest).result(timeout=60)
    torch.testing.assert_close(to_torch(got), to_torch(expected)[:, 128:], rtol=1e-4, atol=1e-5)
    row = embedded(ends, [7])
    steps = [hop.submit([*PROMPT, 7], 150, row).result(timeout=60) for hop in (live, other)]
    torch.testing.assert_close(to_torch(steps[0]), to_torch(steps[1]), rtol=1e-4, atol=1e-5)
    assert engine.statistics().prefix_tokens == 0, "nothing of it is retained"


def test_what_nobody_else_needs_is_taken_over_and_not_copied(
    engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []
    copy_from = SessionCache.copy_from

    def count(own: SessionCache, *arguments: Any) -> Generator[None, None, None]:
        copied.append(own)
        return copy_from(own, *arguments)

    monkeypatch.setattr(SessionCache, "copy_from", count)
    expected = reference_tokens(tiny_bloom(), [PROMPT], 1)[0]
    for number in range(3):  # the first makes the rows, the next two get them
        tokens, (begun,), _ = generate([engine], ends, b"s", PROMPT, 1)
        assert tokens == expected
        assert begun.position == (128 if number else 0)
        assert engine.statistics().prefix_tokens == 128
    assert copied == []
    holders = [Hop(engine, name) for name in (b"first", b"second")]
    assert [hop.restored(PROMPT).position for hop in holders] == [128, 128]
    assert len(copied) == 1, "the second from the first, which lives"
    for hop in holders:
        hop.close()
    assert engine.statistics().prefix_tokens == 128
    generate([engine], ends, b"short", PROMPT[:70], 1)
    assert len(copied) == 2, "there are more rows than that"
    assert Hop(engine, b"again").restored(PROMPT).position == 128
    assert len(copied) == 2
    engine.close(b"again")
    whole = PROMPT[:128]  # its last row, too, is known, and has to be computed
    expected = reference_tokens(tiny_bloom(), [whole], 1)[0]
    for _ in range(2):
        tokens, (begun,), _ = generate([engine], ends, b"whole", whole, 1)
        assert (tokens, begun.position) == (expected, 96)
        assert engine.statistics().prefix_tokens == 128
    assert len(copied) == 2, "what it leaves behind is computed anew"


def test_what_is_not_a_hit(engine: Engine, ends: Ends) -> None:
    nothing = Restored(0, None)
    first = Hop(engine, b"first")
    assert first.restored(PROMPT) == nothing
    first.submit(PROMPT, 0, embedded(ends, PROMPT)).result(timeout=60)
    assert first.restored(PROMPT) == nothing, "it has begun"
    second = Hop(engine, b"second")
    assert second.restored(PROMPT[1:]) == nothing
    assert second.restored(PROMPT[:32]) == nothing
    assert second.restored(PROMPT, wire_dtype=DType.BFLOAT16) == nothing
    assert second.restored(PROMPT, span=Span(0, 4)) == nothing
    small = Hop(engine, b"small", max_tokens=70)
    assert small.restored(PROMPT).position == 64
    assert small.restored(PROMPT) == nothing, "twice is once too often"
    engine.open(b"plain", batch=1, max_tokens=200)
    arguments: dict[str, Any] = {"wire_dtype": DType.FLOAT32, "span": ALL}
    assert engine.restore(b"plain", keys(ALL, PROMPT), **arguments).result(timeout=60) == nothing
    unknown = engine.restore(b"unknown", keys(ALL, PROMPT), **arguments).exception(timeout=60)
    assert isinstance(unknown, LocalProtocolError)
    assert engine.statistics().prefix_hits == 1


def test_who_may_share(engine: Engine) -> None:
    for arguments in ({"batch": 2}, {"batch": 1, "padding": (1,)}):
        with pytest.raises(LocalProtocolError, match="single sequences without padding"):
            engine.open(b"s", max_tokens=9, prefixes=True, **arguments)


def test_keys_of_a_session_that_does_not_share_are_ignored(engine: Engine, ends: Ends) -> None:
    engine.open(b"plain", batch=1, max_tokens=200)
    hidden, span = embedded(ends, PROMPT), ALL
    engine.submit(
        b"plain",
        position=0,
        hidden=hidden,
        wire_dtype=DType.FLOAT32,
        span=span,
        keys=labels(ALL, PROMPT),
    ).result(timeout=60)
    assert Hop(engine, b"other").restored(PROMPT).position == 0
    engine.close(b"plain")
    assert engine.statistics().prefix_tokens == 0


def test_keys_are_for_the_rows_of_their_step(engine: Engine, ends: Ends) -> None:
    hop = Hop(engine, b"s")
    hop.submit(PROMPT[:40], 0, embedded(ends, PROMPT[:40])).result(timeout=60)
    for position in (32, 40, 42):
        refused = hop.submit(PROMPT, 40, embedded(ends, [1]), keys=[(position, b"k")])
        assert isinstance(refused.exception(timeout=60), LocalProtocolError)
    hop.submit(PROMPT[:41], 40, embedded(ends, PROMPT[40:41]), keys=[(41, b"k")]).result(60)


def test_a_rewind_takes_off_what_is_no_longer_true(engine: Engine, ends: Ends) -> None:
    hop = Hop(engine, b"s")
    hop.submit(PROMPT, 0, embedded(ends, PROMPT)).result(timeout=60)
    edited = [*PROMPT[:50], *range(60)]
    hop.submit(edited, 50, embedded(ends, edited[50:])).result(timeout=60)
    assert Hop(engine, b"old").restored(PROMPT).position == 32
    assert Hop(engine, b"new").restored(edited).position == 96
    hop.close()
    for name in (b"old", b"new"):
        engine.close(name)
    assert engine.statistics().prefix_tokens == 96
    assert Hop(engine, b"third").restored(edited).position == 96


def test_a_step_that_fails_leaves_no_label(
    engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    hop = Hop(engine, b"s")
    hop.submit(PROMPT, 0, embedded(ends, PROMPT)).result(timeout=60)
    run = engine.blocks.run

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.blocks, "run", fail)
    assert hop.submit(PROMPT, 40, embedded(ends, PROMPT[40:])).exception(timeout=60)
    monkeypatch.setattr(engine.blocks, "run", run)
    assert Hop(engine, b"other").restored(PROMPT).position == 32
    hop.submit(PROMPT, 40, embedded(ends, PROMPT[40:])).result(timeout=60)
    assert Hop(engine, b"third").restored(PROMPT).position == 128


def test_what_is_retained_never_costs_a_session_its_room(engine: Engine, ends: Ends) -> None:
    texts = [[n, *PROMPT[:99]] for n in range(4)]
    for text in texts:
        hop = Hop(engine, b"s")
        hop.submit(text, 0, embedded(ends, text)).result(timeout=60)
        hop.close()
    statistics = engine.statistics()
    assert (statistics.cache_tokens_used, statistics.prefix_tokens) == (0, 4 * 96)
    user = Hop(engine, b"user")  # 200 of 1000
    assert user.restored(texts[0]).position == 96  # the first is the last to go now
    engine.open(b"large", batch=1, max_tokens=600)
    assert engine.statistics().prefix_tokens == 2 * 96
    with pytest.raises(CacheFull, match="only 200 of 1000 are free"):
        engine.open(b"more", batch=1, max_tokens=201)
    user.close()
    engine.open(b"rest", batch=1, max_tokens=400)
    assert engine.statistics().prefix_tokens == 0
    engine.close(b"large")
    last = Hop(engine, b"last", max_tokens=600)
    last.submit(texts[0], 0, embedded(ends, texts[0])).result(timeout=60)
    last.close()
    assert engine.statistics().prefix_tokens == 96


def test_closing_while_the_step_that_labels_runs(
    engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go = threading.Event(), threading.Event()
    run = engine.blocks.run

    def wait_and_run(*arguments: Any) -> torch.Tensor:
        began.set()
        assert go.wait(60)
        return run(*arguments)

    monkeypatch.setattr(engine.blocks, "run", wait_and_run)
    hop = Hop(engine, b"s")
    step = hop.submit(PROMPT, 0, embedded(ends, PROMPT))
    assert began.wait(60)
    hop.close()
    statistics = engine.statistics()
    assert (statistics.cache_tokens_used, statistics.prefix_tokens) == (200, 0)
    go.set()
    step.result(timeout=60)
    statistics = engine.statistics()
    assert (statistics.cache_tokens_used, statistics.prefix_tokens) == (0, 128)
    assert Hop(engine, b"other").restored(PROMPT).position == 128


def test_closing_between_restoring_and_its_end(engine: Engine, ends: Ends) -> None:
    hop = Hop(engine, b"s")
    hop.submit(PROMPT, 0, embedded(ends, PROMPT)).result(timeout=60)
    hop.close()
    began, go = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert go.wait(60)

    engine.thread.run(hold)
    assert began.wait(60)
    other = Hop(engine, b"other")
    restoring = other.restore(PROMPT)
    other.close()
    engine.open(b"everything", batch=1, max_tokens=1000)  # and what it is to begin with goes, too
    go.set()
    assert restoring.result(timeout=60).position == 0
    statistics = engine.statistics()
    assert (statistics.sessions, statistics.prefix_hits, statistics.prefix_tokens) == (1, 0, 0)


def test_copies_in_slices_let_rounds_in_between(
    engine: Engine, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petals.inference.prefix_rows._SLICE_BYTES", 1)
    hop = Hop(engine, b"s")
    hop.submit(PROMPT, 0, embedded(ends, PROMPT)).result(timeout=60)
    engine.open(b"decoding", batch=1, max_tokens=200)
    futures = []
    for number, (start, end) in enumerate(pairwise(range(0, 40, 5))):
        other = Hop(engine, bytes([number]), max_tokens=50)
        futures.append(other.restore([*PROMPT[:32], 1]))
        hidden = embedded(ends, PROMPT[start:end])
        arguments: dict[str, Any] = {"wire_dtype": DType.FLOAT32, "span": ALL}
        engine.submit(b"decoding", position=start, hidden=hidden, **arguments).result(60)
        assert futures[-1].result(timeout=60).position == 32
        other.close()


def test_shutdown_forgets_everything(checkpoint: Checkpoint, ends: Ends) -> None:
    with serving(checkpoint, ALL) as (engine,):
        for name in (b"retained", b"live"):
            hop = Hop(engine, name)
            hop.submit(PROMPT, 0, embedded(ends, PROMPT)).result(timeout=60)
            if name == b"retained":
                hop.close()
        assert engine.statistics().prefix_tokens == 128
    statistics = engine.statistics()
    assert (statistics.sessions, statistics.prefix_tokens) == (0, 0)
