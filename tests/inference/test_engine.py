"""What the engine promises about sessions, steps and cache; numbers are test_exactness's."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
import torch
from petals.inference.attention import Plan
from petals.inference.checkpoint import Checkpoint, open_checkpoint
from petals.inference.engine import MAX_QUEUED_STEPS, Engine, Priority
from petals.inference.tensors import to_torch, to_wire
from petals.inference.torch_thread import TorchThread
from petals.protocol.errors import CacheFull, LocalProtocolError, ModelError, RemoteProtocolError
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor
from support.engines import serving
from support.tiny_bloom import save_bloom

ALL = Span(0, 5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_bloom(tmp_path_factory.mktemp("bloom")))


@pytest.fixture
def engine(checkpoint: Checkpoint) -> Iterator[Engine]:
    with serving(checkpoint, ALL, cache_tokens=100) as (engine,):
        yield engine


class Gate:
    """Holds the engine's thread in front of the blocks until it is opened."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Semaphore(0)
        self.batches: list[int] = []
        """Rows of each batch that has come to the blocks."""
        self._open = threading.Event()
        self.run: Callable[[torch.Tensor, Plan, Span], torch.Tensor] = engine.blocks.run
        monkeypatch.setattr(engine.blocks, "run", self._wait_and_run)

    def _wait_and_run(self, hidden: torch.Tensor, plan: Plan, span: Span) -> torch.Tensor:
        self.batches.append(plan.rows)
        self.reached.release()
        assert self._open.wait(60)
        return self.run(hidden, plan, span)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(engine, monkeypatch)
    yield gate
    gate.open()


def rows(count: int, *, batch: int = 1, seed: int = 0) -> WireTensor:
    generator = torch.Generator().manual_seed(seed)
    return to_wire(torch.randn((batch, count, 48), generator=generator))


def submit(
    engine: Engine, session_id: bytes, position: int, hidden: WireTensor, **changes: Any
) -> Future[WireTensor]:
    arguments: dict[str, Any] = {"wire_dtype": DType.FLOAT32, "span": ALL} | changes
    return engine.submit(session_id, position=position, hidden=hidden, **arguments)


def error_of(future: Future[WireTensor]) -> str:
    error = future.exception(timeout=60)
    assert isinstance(error, LocalProtocolError)
    return str(error)


def test_waiting_decode_steps_and_one_prefill_share_a_round(engine: Engine, gate: Gate) -> None:
    for name in (b"first", b"a", b"b", b"c", b"d"):
        engine.open(name, batch=2 if name == b"b" else 1, max_tokens=10)
    futures = [submit(engine, b"first", 0, rows(1))]
    assert gate.reached.acquire(timeout=60)
    futures += [
        submit(engine, b"a", 0, rows(1)),
        submit(engine, b"c", 0, rows(4)),
        submit(engine, b"b", 0, rows(1, batch=2)),
        submit(engine, b"d", 0, rows(5)),  # a second prefill waits
        submit(engine, b"a", 1, rows(1)),  # and so does a second step of one session
    ]
    gate.open()
    for future in futures:
        future.result(timeout=60)
    assert gate.batches == [1, 1 + 4 + 2, 5 + 1]
    statistics = engine.statistics()
    assert (statistics.steps, statistics.rounds, statistics.rows) == (6, 3, 14)
    assert statistics.busy_seconds > 0


def test_a_long_prefill_lets_decode_steps_in_between(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoint, ALL, prefill_rows=4) as (engine,):
        gate = Gate(engine, monkeypatch)
        engine.open(b"long", batch=1, max_tokens=20)
        engine.open(b"short", batch=1, max_tokens=20)
        prefill = submit(engine, b"long", 0, rows(10))
        assert gate.reached.acquire(timeout=60)
        decode = submit(engine, b"short", 0, rows(1))
        gate.open()
        prefill.result(timeout=60)
        decode.result(timeout=60)
        assert gate.batches == [4, 4 + 1, 2]


def test_sessions_of_other_spans_run_in_rounds_of_their_own(engine: Engine, gate: Gate) -> None:
    for name in (b"first", b"all", b"part"):
        engine.open(name, batch=1, max_tokens=10)
    first = submit(engine, b"first", 0, rows(1))
    assert gate.reached.acquire(timeout=60)
    others = [
        submit(engine, b"part", 0, rows(1), span=Span(2, 4)),
        submit(engine, b"all", 0, rows(1)),
    ]
    gate.open()
    for future in (first, *others):
        future.result(timeout=60)
    assert gate.batches == [1, 1, 1]


def test_what_is_wrong_with_a_step_is_said_and_changes_nothing(engine: Engine) -> None:
    engine.open(b"s", batch=1, max_tokens=10)
    good = submit(engine, b"s", 0, rows(4)).result(timeout=60)
    assert "not open here" in error_of(submit(engine, b"nobody", 0, rows(1)))
    assert "leaves a gap: the session holds 4" in error_of(submit(engine, b"s", 5, rows(1)))
    assert "leaves a gap" in error_of(submit(engine, b"s", -1, rows(1)))
    assert "11 tokens in a session opened for 10" in error_of(submit(engine, b"s", 4, rows(7)))
    assert "must be [1, rows, 48]" in error_of(submit(engine, b"s", 2, rows(1, batch=2)))
    assert "must be [1, rows, 48]" in error_of(
        submit(engine, b"s", 2, to_wire(torch.ones(1, 1, 47)))
    )
    assert "must be [1, rows, 48]" in error_of(submit(engine, b"s", 2, to_wire(torch.ones(1, 48))))
    assert "the session uses 0:5" in error_of(submit(engine, b"s", 2, rows(1), span=Span(0, 4)))
    assert "loaded are 0:5" in error_of(submit(engine, b"s", 2, rows(1), span=Span(0, 6)))
    poison = rows(1)
    tensor = to_torch(poison).clone()
    tensor[0, 0, 7] = torch.nan
    assert isinstance(
        submit(engine, b"s", 2, to_wire(tensor)).exception(timeout=60), RemoteProtocolError
    )
    more = submit(engine, b"s", 4, rows(1, seed=1)).result(timeout=60)
    again = submit(engine, b"s", 0, rows(4)).result(timeout=60)
    torch.testing.assert_close(to_torch(again), to_torch(good))
    torch.testing.assert_close(
        to_torch(submit(engine, b"s", 4, rows(1, seed=1)).result(timeout=60)), to_torch(more)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_session_goes_on_behind_a_row_that_was_not_finite(engine: Engine, bad: float) -> None:
    for name in (b"s", b"untouched"):
        engine.open(name, batch=1, max_tokens=10)
        submit(engine, name, 0, rows(4)).result(timeout=60)
    poison = to_torch(rows(1)).clone()
    poison[0, 0, 7] = bad
    refused = submit(engine, b"s", 4, to_wire(poison)).exception(timeout=60)
    assert isinstance(refused, RemoteProtocolError)
    for position in (4, 5, 6):
        outputs = [
            submit(engine, name, position, rows(1, seed=position)).result(timeout=60)
            for name in (b"s", b"untouched")
        ]
        assert bytes(outputs[0].data) == bytes(outputs[1].data)


def test_rows_of_a_batch_go_on_from_others(engine: Engine) -> None:
    """Beside sessions of one row each, which run the rows from which each of the batch has come."""
    prompts = [rows(5, seed=seed) for seed in range(3)]
    ends = [rows(1, seed=10 + seed) for seed in range(3)]
    engine.open(b"batch", batch=3, max_tokens=8)
    submit(engine, b"batch", 0, to_wire(torch.cat([to_torch(prompt) for prompt in prompts])))
    last = to_wire(torch.cat([to_torch(end) for end in ends]))
    together = submit(engine, b"batch", 5, last, order=(2, 2, 0)).result(timeout=60)
    longer = to_wire(torch.cat([to_torch(last)] * 2, dim=1))
    back = submit(engine, b"batch", 4, longer, order=(0, 2, 2)).result(timeout=60)
    for lane, source in enumerate((2, 2, 0)):
        name = b"alone %d" % lane
        engine.open(name, batch=1, max_tokens=8)
        submit(engine, name, 0, prompts[source])
        alone = submit(engine, name, 5, ends[lane]).result(timeout=60)
        torch.testing.assert_close(to_torch(together)[lane], to_torch(alone)[0])
    for lane, source in enumerate((2, 0, 0)):
        name = b"further back %d" % lane
        engine.open(name, batch=1, max_tokens=8)
        submit(engine, name, 0, prompts[source])
        end = to_wire(to_torch(longer)[lane : lane + 1])
        alone = submit(engine, name, 4, end).result(timeout=60)
        torch.testing.assert_close(to_torch(back)[lane], to_torch(alone)[0])


def test_a_row_cannot_go_on_from_one_with_other_padding(engine: Engine) -> None:
    engine.open(b"s", batch=2, max_tokens=10, padding=(0, 1))
    submit(engine, b"s", 0, rows(4, batch=2))
    refused = submit(engine, b"s", 4, rows(1, batch=2), order=(1, 0))
    assert "rows [1, 0] cannot take the places of a batch with padding [0, 1]" in error_of(refused)
    submit(engine, b"s", 4, rows(1, batch=2)).result(timeout=60)


def test_opening_badly(engine: Engine) -> None:
    engine.open(b"s", batch=1, max_tokens=1)
    for problem, arguments in {
        "already open": {"batch": 1, "max_tokens": 1},
        "batch >= 1": {"batch": 0, "max_tokens": 1},
        "max_tokens >= 1": {"batch": 1, "max_tokens": 0},
        "padding must give 2": {"batch": 2, "max_tokens": 4, "padding": (1,)},
        "numbers from 0 to 3": {"batch": 2, "max_tokens": 4, "padding": (1, 4)},
    }.items():
        with pytest.raises(LocalProtocolError, match=problem):
            engine.open(b"s", **arguments)  # type: ignore[arg-type]
    assert engine.statistics().cache_tokens_used == 1


def test_a_full_cache(engine: Engine) -> None:
    with pytest.raises(
        CacheFull, match="101 tokens of KV cache, but this node has only 100"
    ) as never:
        engine.open(b"s", batch=1, max_tokens=101)
    assert never.value.retry_after is None
    engine.open(b"s", batch=3, max_tokens=30)
    with pytest.raises(CacheFull, match="only 10 of 100 are free now") as later:
        engine.open(b"t", batch=1, max_tokens=11)
    assert later.value.retry_after is not None and later.value.retry_after > 0
    engine.open(b"t", batch=1, max_tokens=10)
    engine.close(b"s")
    assert engine.statistics().cache_tokens_used == 10


def test_padding_rows_are_zeros_and_cost_nothing(engine: Engine) -> None:
    engine.open(b"s", batch=2, max_tokens=10, padding=(3, 0))
    output = to_torch(submit(engine, b"s", 0, rows(2, batch=2)).result(timeout=60))
    assert (output[0] == 0).all() and (output[1] != 0).any()
    output = to_torch(submit(engine, b"s", 2, rows(3, batch=2)).result(timeout=60))
    assert (output[0, 0] == 0).all() and (output[0, 1:] != 0).any()
    assert engine.statistics().rows == 2 + 5
    engine.open(b"padding only", batch=1, max_tokens=10, padding=(5,))
    assert (to_torch(submit(engine, b"padding only", 0, rows(5)).result(timeout=60)) == 0).all()
    assert engine.statistics().rows == 7


def test_the_output_has_the_wire_dtype(engine: Engine) -> None:
    engine.open(b"s", batch=1, max_tokens=10)
    exact = to_torch(submit(engine, b"s", 0, rows(3)).result(timeout=60))
    for dtype in (DType.BFLOAT16, DType.FLOAT16):
        wire = submit(engine, b"s", 0, rows(3), wire_dtype=dtype).result(timeout=60)
        assert wire.dtype is dtype
        torch.testing.assert_close(to_torch(wire).float(), exact, rtol=1e-2, atol=1e-2)


def test_output_that_the_wire_dtype_cannot_hold(engine: Engine) -> None:
    engine.open(b"s", batch=1, max_tokens=10)
    for count in (1, 3):
        large = to_wire(torch.full((1, count, 48), 1e6))
        error = submit(engine, b"s", 0, large, wire_dtype=DType.FLOAT16).exception(timeout=60)
        assert isinstance(error, ModelError) and "too large for float16" in str(error)


def test_only_the_step_that_fails_fails(
    engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gate.run

    def run_unless_poisoned(hidden: torch.Tensor, plan: Plan, span: Span) -> torch.Tensor:
        if (hidden == 1234).any():
            raise RuntimeError("out of memory")
        output = run(hidden, plan, span)
        return torch.where(hidden == 4321, torch.inf, output)

    gate.run = run_unless_poisoned
    for name in (b"first", b"good", b"bad", b"infinite"):
        engine.open(name, batch=1, max_tokens=10)
    submit(engine, b"first", 0, rows(1))
    assert gate.reached.acquire(timeout=60)
    good = submit(engine, b"good", 0, rows(1))
    bad = submit(engine, b"bad", 0, to_wire(torch.full((1, 1, 48), 1234.0)))
    infinite = submit(engine, b"infinite", 0, to_wire(torch.full((1, 1, 48), 4321.0)))
    gate.open()
    expected = submit(engine, b"first", 0, rows(1))
    torch.testing.assert_close(to_torch(good.result(60)), to_torch(expected.result(60)))
    with pytest.raises(ModelError, match="computing blocks 0:5 failed: out of memory"):
        bad.result(60)
    with pytest.raises(ModelError, match="gave NaN or infinity"):
        infinite.result(60)
    longer = submit(engine, b"infinite", 0, to_wire(torch.full((1, 3, 48), 4321.0)))
    with pytest.raises(ModelError, match="gave NaN or infinity"):
        longer.result(60)
    assert "the session holds 0" in error_of(submit(engine, b"infinite", 1, rows(1)))
    submit(engine, b"bad", 0, rows(1)).result(60)


@pytest.mark.parametrize("count", [1, 3])
def test_memory_that_ends_before_the_blocks_fails_that_step_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    engine.open(b"s", batch=1, max_tokens=10)
    with monkeypatch.context() as patch:
        patch.setattr("petals.inference.rounds.to_torch", fail)
        with pytest.raises(ModelError, match="computing blocks 0:5 failed: out of memory"):
            submit(engine, b"s", 0, rows(count)).result(timeout=60)
    submit(engine, b"s", 0, rows(count)).result(timeout=60)


def test_closing_while_steps_wait_and_run(engine: Engine, gate: Gate) -> None:
    engine.open(b"running", batch=1, max_tokens=40)
    engine.open(b"waiting", batch=1, max_tokens=40)
    running = submit(engine, b"running", 0, rows(2))
    assert gate.reached.acquire(timeout=60)
    behind = submit(engine, b"running", 2, rows(1))
    waiting = [submit(engine, b"waiting", 0, rows(2)), submit(engine, b"waiting", 2, rows(1))]
    assert engine.statistics().queued == 4
    for _ in range(2):
        engine.close(b"running")
        engine.close(b"waiting")
    for future in (behind, *waiting):
        with pytest.raises(CancelledError):
            future.result(timeout=60)
    statistics = engine.statistics()
    assert (statistics.sessions, statistics.queued) == (0, 1)
    assert statistics.cache_tokens_used == 40, "the running step still writes into its cache"
    gate.open()
    running.result(timeout=60)
    assert engine.statistics().cache_tokens_used == 0
    engine.open(b"running", batch=1, max_tokens=100)
    submit(engine, b"running", 0, rows(1)).result(timeout=60)


def test_closing_in_the_middle_of_a_long_prefill(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoint, ALL, prefill_rows=2) as (engine,):
        gate = Gate(engine, monkeypatch)
        engine.open(b"s", batch=1, max_tokens=20)
        prefill = submit(engine, b"s", 0, rows(10))
        assert gate.reached.acquire(timeout=60)
        engine.close(b"s")
        gate.open()
        with pytest.raises(CancelledError):
            prefill.result(timeout=60)
        assert gate.batches == [2]
        assert engine.statistics().cache_tokens_used == 0


def test_a_step_that_its_owner_cancelled_is_skipped(engine: Engine, gate: Gate) -> None:
    engine.open(b"s", batch=1, max_tokens=10)
    engine.open(b"t", batch=1, max_tokens=10)
    first = submit(engine, b"s", 0, rows(1))
    assert gate.reached.acquire(timeout=60)
    unwanted = submit(engine, b"t", 0, rows(1))
    assert unwanted.cancel()
    gate.open()
    first.result(timeout=60)
    submit(engine, b"t", 0, rows(2)).result(timeout=60)
    assert gate.batches == [1, 2]


def test_a_session_has_only_so_many_steps_waiting(engine: Engine, gate: Gate) -> None:
    for name in (b"s", b"t"):
        engine.open(name, batch=1, max_tokens=20)
    futures = [submit(engine, b"s", 0, rows(1))]
    assert gate.reached.acquire(timeout=60)
    futures += [submit(engine, b"s", 1 + n, rows(1)) for n in range(MAX_QUEUED_STEPS)]
    assert "steps waiting" in error_of(submit(engine, b"s", 1 + MAX_QUEUED_STEPS, rows(1)))
    futures.append(submit(engine, b"t", 0, rows(1)))
    gate.open()
    for future in futures:
        future.result(timeout=60)
    submit(engine, b"s", 1 + MAX_QUEUED_STEPS, rows(1)).result(timeout=60)


def test_prefills_go_by_priority_and_in_turns_between_originators(
    engine: Engine, gate: Gate
) -> None:
    engine.open(b"first", batch=1, max_tokens=1)
    for name, originator, priority in (
        (b"background", "z", Priority.BACKGROUND),
        (b"a1", "a", Priority.NORMAL),
        (b"a2", "a", Priority.NORMAL),
        (b"b", "b", Priority.NORMAL),
        (b"own", "us", Priority.OWN),
    ):
        engine.open(name, batch=1, max_tokens=10, originator=originator, priority=priority)
    submit(engine, b"first", 0, rows(1))
    assert gate.reached.acquire(timeout=60)
    sizes = {b"background": 6, b"a1": 3, b"a2": 4, b"b": 5, b"own": 2}
    futures = [submit(engine, name, 0, rows(count)) for name, count in sizes.items()]
    gate.open()
    for future in futures:
        future.result(timeout=60)
    assert gate.batches == [1, 2, 3, 5, 4, 6]


def test_a_round_waits_for_those_who_always_come_at_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0  # it goes on only while blocks run
    engine = Engine(checkpoint.load_blocks(ALL), cache_tokens=100, clock=lambda: now)
    run, batches = engine.blocks.run, list[int]()

    def run_slowly(hidden: torch.Tensor, plan: Plan, span: Span) -> torch.Tensor:
        nonlocal now
        now += 0.08
        batches.append(plan.rows)
        return run(hidden, plan, span)

    monkeypatch.setattr(engine.blocks, "run", run_slowly)
    for name in (b"a", b"b", b"c"):
        engine.open(name, batch=1, max_tokens=20)

    def together(position: int) -> None:
        begun, go = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            assert go.wait(60)

        engine.thread.run(hold)
        assert begun.wait(60)
        futures = [submit(engine, name, position, rows(1)) for name in (b"a", b"b", b"c")]
        go.set()
        for future in futures:
            future.result(timeout=60)

    together(0)
    together(1)
    first = submit(engine, b"a", 2, rows(1))
    second = submit(engine, b"c", 2, rows(1))
    engine.thread.run(lambda: None).result(timeout=60)
    assert not first.done()
    third = submit(engine, b"b", 2, rows(1))
    for future in (first, second, third):
        future.result(timeout=60)
    assert batches == [3, 3, 3]
    first, second = submit(engine, b"a", 3, rows(1)), submit(engine, b"b", 3, rows(1))
    engine.close(b"c")
    for future in (first, second):
        future.result(timeout=60)
    assert batches == [3, 3, 3, 2]
    assert engine.shutdown()


def test_a_session_closed_during_a_prefill_leaves_the_round_to_others(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoint, ALL, prefill_rows=4) as (engine,):
        gate = Gate(engine, monkeypatch)
        for name in (b"closed", b"decoding", b"waiting"):
            engine.open(name, batch=1, max_tokens=20, originator=name.decode())
        prefill = submit(engine, b"closed", 0, rows(20))
        assert gate.reached.acquire(timeout=60)
        others = [submit(engine, b"decoding", 0, rows(1)), submit(engine, b"waiting", 0, rows(6))]
        engine.close(b"closed")
        gate.open()
        for future in others:
            future.result(timeout=60)
        with pytest.raises(CancelledError):
            prefill.result(timeout=60)
        assert gate.batches == [4, 1 + 4, 2]


def test_an_engine_on_a_thread_that_others_use(checkpoint: Checkpoint) -> None:
    thread = TorchThread()
    engines = [
        Engine(checkpoint.load_blocks(span), cache_tokens=100, thread=thread)
        for span in (Span(0, 3), Span(3, 5))
    ]
    for engine in engines:
        engine.open(b"s", batch=1, max_tokens=10)
        submit(engine, b"s", 0, rows(2), span=engine.blocks.span).result(timeout=60)
    assert engines[0].shutdown()
    submit(engines[1], b"s", 2, rows(1), span=Span(3, 5)).result(timeout=60)
    assert thread.run(lambda: 7).result(timeout=60) == 7
    assert engines[1].shutdown()
    assert thread.shutdown()
    with pytest.raises(LocalProtocolError, match="shut down"):
        Engine(engines[0].blocks, cache_tokens=100, thread=thread)


def test_mixed_dtypes_in_one_round(engine: Engine, gate: Gate) -> None:
    dtypes = [DType.FLOAT32, DType.BFLOAT16, DType.INT8, DType.FLOAT32, DType.BFLOAT16]
    for number in range(5):
        engine.open(bytes([number]), batch=1 + number % 2, max_tokens=2)
    engine.open(b"first", batch=1, max_tokens=1)
    submit(engine, b"first", 0, rows(1))
    assert gate.reached.acquire(timeout=60)
    hidden = [to_torch(rows(1, batch=1 + n % 2, seed=n)) for n in range(5)]
    futures = [
        submit(engine, bytes([n]), 0, to_wire(hidden[n], dtype), wire_dtype=dtype)
        for n, dtype in enumerate(dtypes)
    ]
    gate.open()
    for number, (future, dtype) in enumerate(zip(futures, dtypes, strict=True)):
        got = future.result(timeout=60)
        assert got.dtype is dtype
        alone = submit(engine, bytes([number]), 0, to_wire(hidden[number])).result(timeout=60)
        torch.testing.assert_close(to_torch(got).float(), to_torch(alone), rtol=0.1, atol=0.1)
    assert gate.batches[:2] == [1, 7]


def test_bad_rows_among_good_ones_are_refused_alone(engine: Engine, gate: Gate) -> None:
    for name in (b"first", b"good", b"bad", b"also good"):
        engine.open(name, batch=1, max_tokens=5)
    submit(engine, b"first", 0, rows(1))
    assert gate.reached.acquire(timeout=60)
    good = submit(engine, b"good", 0, rows(1))
    bad = submit(engine, b"bad", 0, to_wire(torch.full((1, 1, 48), torch.inf)))
    also_good = submit(engine, b"also good", 0, rows(1, seed=1))
    gate.open()
    assert isinstance(bad.exception(timeout=60), RemoteProtocolError)
    assert gate.batches == [1, 3]
    for future, seed in ((good, 0), (also_good, 1)):
        alone = submit(engine, b"first", 0, rows(1, seed=seed)).result(timeout=60)
        torch.testing.assert_close(to_torch(future.result(timeout=60)), to_torch(alone))


def test_values_that_only_add_up_to_infinity_are_fine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.blocks, "run", lambda hidden, *_: hidden)
    engine.open(b"s", batch=1, max_tokens=5)
    large = to_wire(torch.full((1, 1, 48), 3e38))
    assert bytes(submit(engine, b"s", 0, large).result(timeout=60).data) == bytes(large.data)


def test_what_is_handed_out_is_no_part_of_the_batch(engine: Engine, gate: Gate) -> None:
    for name in (b"first", b"a", b"b"):
        engine.open(name, batch=1, max_tokens=20)
    submit(engine, b"first", 0, rows(1))
    assert gate.reached.acquire(timeout=60)
    futures = [submit(engine, b"a", 0, rows(1)), submit(engine, b"b", 0, rows(15))]
    gate.open()
    outputs = [future.result(timeout=60) for future in futures]
    assert isinstance(outputs[0].data, bytes)
    assert len(outputs[1].data) == 15 * 48 * 4


def test_shutdown_with_steps_waiting_and_running(engine: Engine, gate: Gate) -> None:
    engine.open(b"s", batch=1, max_tokens=10)
    running = submit(engine, b"s", 0, rows(1))
    assert gate.reached.acquire(timeout=60)
    waiting = submit(engine, b"s", 1, rows(1))
    assert not engine.shutdown(timeout=0), "a round is never cut short"
    assert waiting.cancelled()
    gate.open()
    running.result(timeout=60)
    assert engine.shutdown()
    assert engine.statistics().cache_tokens_used == 0
    with pytest.raises(LocalProtocolError, match="shut down"):
        engine.open(b"t", batch=1, max_tokens=10)
    assert "not open here" in error_of(submit(engine, b"s", 0, rows(1)))


def test_many_threads_open_step_and_close(checkpoint: Checkpoint) -> None:
    with serving(checkpoint, ALL, cache_tokens=60, prefill_rows=3) as (engine,):

        def use(number: int) -> None:
            for turn in range(5):
                name = bytes([number, turn])
                try:
                    engine.open(name, batch=1, max_tokens=20)
                except CacheFull:
                    continue
                futures = [submit(engine, name, 0, rows(7)), submit(engine, name, 7, rows(1))]
                if (number + turn) % 3:
                    futures[-1].result(timeout=60)
                engine.close(name)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    statistics = engine.statistics()
    assert (statistics.sessions, statistics.queued, statistics.cache_tokens_used) == (0, 0, 0)


def test_the_worker_is_one_named_thread(engine: Engine) -> None:
    assert [t.name for t in threading.enumerate()].count("petals-torch") == 1
