"""Strangers who send a live node whatever they like: it says no, stays up, and serves the others.

Every test leaves the nodes as it found them, by their own statistics, and while the strangers are
at it an honest originator generates through the same nodes, exactly.
"""

import dataclasses
import random  # noqa: TID251 - tests throw dice with known seeds
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgpack
import pytest
import trio
from petals.node.identity import new_identity
from petals.protocol.checks import MAX_FRAME, Peer, Rewind
from petals.protocol.errors import ErrorCode
from petals.protocol.frames import (
    DESCRIBE_PROTOCOL,
    PROTOCOL_VERSION,
    SESSION_PROTOCOL,
    Close,
    Describe,
    Description,
    Failed,
    Hello,
    Link,
    Output,
    Probe,
    Ready,
    Refused,
    Relink,
    Resume,
    State,
)
from petals.protocol.span import Span
from petals.protocol.tensor import DType, WireTensor
from support.processes import ProcessSwarm, swarm
from support.reference import ReferenceModel
from support.strangers import HELLO, Attack, Stranger, attacking, framed, raw, rejection, said

ABANDONED = 200


@pytest.fixture(scope="module")
def processes(
    random_bloom: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as running:
        running.serve(random_bloom.name, "0:4", "4:8")
        yield running


@pytest.fixture
async def attack(random_bloom: ReferenceModel, processes: ProcessSwarm) -> AsyncIterator[Attack]:
    async with attacking(processes, random_bloom) as begun:
        yield begun


async def test_bytes_that_are_no_frames(attack: Attack) -> None:
    dice = random.Random(2)
    junk = [dice.randbytes(dice.choice([5, 100, 5_000, 200_000])) for _ in range(20)]
    junk += [said(HELLO) + bytes_ for bytes_ in junk[:10]]
    bombs = [
        (MAX_FRAME + 1).to_bytes(4, "big") + b"\x91",
        b"\xff\xff\xff\xff",
        framed(b""),
        framed(b"\xc1" * 100),
        framed(b"\x91" * 10_000),  # nested ever deeper
        framed(b"\x91\xdf\xff\xff\xff\xff"),  # a map of four thousand million
        framed(b"\x91\xdb\xff\xff\xff\xff"),  # a text of as many bytes
        framed(b"\x91\xc9\xff\xff\xff\xff\x01"),  # an extension of as many
        framed(msgpack.packb([{"kind": "hello"}])),
        framed(msgpack.packb([{"kind": ["hello"]}])),
        framed(msgpack.packb([{"kind": "surprise"}])),
        framed(msgpack.packb([{"kind": "close", "reason": 5}])),
        said(Close("x"))[:-1] + b"",
        said(HELLO) + framed(msgpack.packb(["hello"])),
        said(HELLO) + framed(msgpack.packb([{"kind": "step", "tensors": [["float32", [1], "?"]]}])),
        said(HELLO) + said(attack.step())[:-1] + b"",
        said(HELLO) + framed(said(attack.step())[4:-1]),
        said(HELLO) + framed(said(attack.step())[4:] + b"x"),
        raw(Hello(1, "x"), tensors=[["float32", [1 << 40], "none"]]),
    ]
    async with attack.stranger() as stranger, trio.open_nursery() as nursery:

        async def throw(data: bytes, protocol: str) -> None:
            for frame in await stranger.ask(data, protocol):
                assert isinstance(frame, Refused | Failed), frame
                assert frame.reason

        for data in junk + bombs:
            nursery.start_soon(throw, data, SESSION_PROTOCOL)
            nursery.start_soon(throw, data, DESCRIBE_PROTOCOL)


async def test_bytes_that_are_not_even_the_transport(attack: Attack) -> None:
    dice = random.Random(3)
    port = int(attack.node.multiaddr.split("/")[4])
    for data in (b"GET / HTTP/1.1\r\n\r\n", dice.randbytes(100_000), b"\x13/multistream/1.0.0\n"):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(data)


async def test_frames_cut_off(attack: Attack) -> None:
    """A stream that ends in mid-frame is not waited for; what was opened on it is closed."""
    async with attack.stranger() as stranger:
        opening = attack.opening(stranger)
        for data in (
            b"\x00\x00",
            said(HELLO)[:-2],
            said(HELLO, opening)[:-10],
            said(HELLO, opening, Probe(1))[:-1],
        ):
            stream = await stranger.stream()
            await stream.send(data)
            await stream.close()


async def test_kinds_and_orders_that_make_no_sense(attack: Attack) -> None:
    async with attack.stranger() as stranger:
        opening = attack.opening(stranger)
        link, hidden = Link(opening.session, 1), attack.hidden(1, 1)
        for data, words in [
            (said(link), "before hello"),
            (said(attack.step()), "before hello"),
            (said(Hello(PROTOCOL_VERSION + 1, "99.0")), "update the older"),
            (said(HELLO, HELLO), "begins with open or link, not hello"),
            (said(HELLO, attack.step()), "not step"),
            (said(HELLO, Output(0, 0, hidden)), "not output"),
            (said(HELLO, Ready(1, 5)), "not ready"),
            (said(HELLO, Describe()), "not describe"),
            (raw(opening, epoch=-1), "epoch"),
            (said(HELLO) + raw(opening, session=b"short"), "open.session must be 16 to 16 bytes"),
            (said(HELLO) + raw(opening, batch=65), "open.batch"),
            (said(HELLO) + raw(opening, batch=True), "open.batch"),
            (said(HELLO) + raw(opening, padding=[-1]), "open.padding"),
            (said(HELLO) + raw(opening, span=[4, 4]), "open.span"),
            (said(HELLO) + raw(opening, max_tokens=1 << 40), "open.max_tokens"),
            (said(HELLO) + raw(opening, wire_dtype="float64"), "open.wire_dtype"),
            (said(HELLO) + raw(opening, model=None), "open.model"),
        ]:
            code, reason = rejection(await stranger.ask(data))
            assert code is ErrorCode.PROTOCOL
            assert words in reason
        code, reason = rejection(await stranger.ask(said(HELLO, opening), DESCRIBE_PROTOCOL))
        assert (code, reason) == (ErrorCode.PROTOCOL, "ask with a describe frame")


async def test_sessions_that_cannot_be(attack: Attack) -> None:
    async with attack.stranger() as stranger:
        left = attack.announcement.cache_tokens_left
        changes: list[tuple[dict[str, Any], ErrorCode, str]] = [
            ({"model": "0" * 64}, ErrorCode.WRONG_MODEL, "not 000000000000"),
            ({"span": Span(4, 8)}, ErrorCode.WRONG_SPAN, "serves blocks 0:4, not 4:8"),
            ({"span": Span(3, 5)}, ErrorCode.WRONG_SPAN, "serves blocks 0:4, not 3:5"),
            ({"span": Span(0, 9999)}, ErrorCode.WRONG_SPAN, "serves blocks 0:4"),
            ({"batch": 3}, ErrorCode.BAD_REQUEST, "a batch of 3 needs as many paddings"),
            ({"padding": ()}, ErrorCode.BAD_REQUEST, "a batch of 1 needs as many paddings"),
            ({"padding": (8,)}, ErrorCode.BAD_REQUEST, "each below max_tokens"),
            ({"max_tokens": left + 1}, ErrorCode.BUSY, f"this node has only {left} in all"),
            ({"batch": 64, "padding": (0,) * 64, "max_tokens": left // 2}, ErrorCode.BUSY, "cache"),
        ]
        for change, code, words in changes:
            opening = attack.opening(stranger, **change)
            said_no = rejection(await stranger.ask(said(HELLO, opening)))
            assert said_no[0] is code
            assert words in said_no[1]


async def test_steps_that_cannot_be(attack: Attack) -> None:
    """Each ends its link, and the originator is told; other sessions go on."""
    hidden = attack.hidden
    flat = WireTensor(DType.FLOAT32, (attack.hidden_size,), bytes(4 * attack.hidden_size))
    narrow = WireTensor(DType.FLOAT32, (1, 1, 7), bytes(28))
    async with attack.stranger() as stranger:
        for data, words in [
            (said(attack.step(hidden=flat)), "hidden states must be float32 [1, rows, "),
            (said(attack.step(hidden=narrow)), "hidden states must be"),
            (said(attack.step(hidden=hidden(2, 1))), "hidden states must be"),
            (said(attack.step(hidden=hidden(1, 1, 1))), "hidden states must be"),
            (said(attack.step(hidden=hidden(1, 1, dtype=DType.FLOAT16))), "got float16"),
            (said(attack.step(rows=9)), "in a session of 8 tokens"),
            (said(attack.step(position=8)), "in a session of 8 tokens"),
            (said(attack.step(position=5)), "at position 5 where 0 comes next"),
            (said(attack.step(rewind=1, position=5)), "rewind 1 starts at 5, beyond 0"),
            (said(attack.step(past=(Rewind(0, 0),))), "told of behind rewind 0"),
            (said(attack.step(rewind=2, past=(Rewind(3, 0),))), "tells of rewinds up to 3"),
            (
                said(attack.step(rewind=1, past=(Rewind(1, 0, (1, 0)),))),
                "sequences [1, 0] cannot take the places of a batch with padding [0]",
            ),
            (said(Probe(1)), "probe has no place on a link"),
            (said(attack.opening(stranger)), "open has no place on a link"),
            (b"\xff" * 100, "is over"),
        ]:
            opening = attack.opening(stranger)
            control = await stranger.session(opening)
            link = await stranger.link(opening)
            await link.send(data)
            code, reason = rejection(await link.rest())
            told = await control.frame()
            assert isinstance(told, Failed)
            assert told.peer_id == stranger.network.peer_id
            assert code is told.code is ErrorCode.PROTOCOL
            assert words in reason
            assert words in told.reason
            await control.send(said(Close("over")))
            assert await control.rest() == []


async def test_a_step_out_of_order_is_answered_with_where_the_hop_is(attack: Attack) -> None:
    async with attack.stranger() as stranger:
        opening = attack.opening(stranger)
        control = await stranger.session(opening)
        link = await stranger.link(opening)
        await link.send(said(attack.step(sequence=3), attack.step(link=5)))
        resume = await link.frame()
        assert resume == Resume(link=1, position=0, rewind=0)
        await control.send(said(Probe(7)))
        state = await control.frame()
        assert isinstance(state, State)
        assert dataclasses.replace(state, passes=0) == State(
            nonce=7, position=0, rewind=0, produced=0, produced_rewind=0, successor_linked=False
        )
        await link.send(said(attack.step(rows=2, link=1)))
        output = await control.frame()
        assert isinstance(output, Output)
        assert output.hidden.shape == (1, 2, attack.hidden_size)
        await link.close()
        await control.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
async def test_hidden_states_that_cannot_be_computed(attack: Attack, value: float) -> None:
    async with attack.stranger() as stranger:
        opening = attack.opening(stranger)
        control = await stranger.session(opening)
        link = await stranger.link(opening)
        await link.send(said(attack.step(hidden=attack.hidden(1, 3, value=value))))
        code, reason = rejection(await control.rest())
        assert code is ErrorCode.COMPUTE
        assert "NaN or infinity" in reason
        await link.rest()


async def test_sessions_of_others(attack: Attack) -> None:
    """Who was not named may not link, nor open, nor end what another has opened."""
    async with attack.stranger() as owner, attack.stranger() as thief:
        opening = attack.opening(owner)
        control = await owner.session(opening)
        stolen = dataclasses.replace(opening, predecessor=thief.network.peer_id, epoch=9)
        code, _ = rejection(await thief.ask(said(HELLO, stolen)))
        assert code is ErrorCode.BAD_REQUEST
        code, _ = rejection(await owner.ask(said(HELLO, opening)))
        assert code is ErrorCode.BAD_REQUEST
        async with trio.open_nursery() as nursery:  # some of these are waited for, for a while

            async def link(session: bytes, epoch: int) -> None:
                frames = await thief.ask(said(HELLO, Link(session, epoch), attack.step()))
                assert rejection(frames)[0] is ErrorCode.UNKNOWN_SESSION

            nursery.start_soon(link, opening.session, opening.epoch)
            nursery.start_soon(link, opening.session, opening.epoch + 1)
            nursery.start_soon(link, bytes(16), 0)
        await control.send(said(Probe(1)))
        state = await control.frame()
        assert isinstance(state, State)
        assert state.position == 0
        await control.close()


async def test_what_has_no_place_on_a_control_stream(attack: Attack) -> None:
    async with attack.stranger() as stranger:
        for frame in (HELLO, attack.step(), attack.opening(stranger), Describe()):
            control = await stranger.session(attack.opening(stranger))
            await control.send(said(frame))
            code, reason = rejection(await control.rest())
            assert code is ErrorCode.PROTOCOL
            assert f"{frame.KIND} has no place on a control stream" in reason


async def test_a_successor_that_is_not_there_is_blamed(attack: Attack) -> None:
    nobody = new_identity().peer_id
    async with attack.stranger() as stranger:
        control = await stranger.session(attack.opening(stranger))
        successor = Peer(nobody, ("/ip4/127.0.0.1/tcp/9", "nonsense"))
        await control.send(said(Relink(2, stranger.network.peer_id, successor)))
        told = await control.frame()
        assert isinstance(told, Failed)
        assert (told.code, told.peer_id) == (ErrorCode.UNREACHABLE, nobody)
        await control.close()


async def test_hundreds_of_abandoned_sessions(attack: Attack) -> None:
    """Left without a word, one stream after another or with the whole connection."""
    async with attack.stranger() as stranger, attack.stranger() as observer:
        controls = [await stranger.session(attack.opening(stranger)) for _ in range(ABANDONED // 2)]
        async with attack.stranger() as leaving:
            for _ in range(ABANDONED // 2):
                await leaving.session(attack.opening(leaving))
            assert await sessions_at(attack, observer) >= ABANDONED
        for control in controls:
            await control.close()


async def sessions_at(attack: Attack, stranger: Stranger) -> int:
    """How many sessions the node says that it has."""
    stream = await stranger.stream(DESCRIBE_PROTOCOL)
    await stream.send(said(HELLO, Describe()))
    described = await stream.frame()
    await stream.close()
    assert isinstance(described, Description)
    return int(described.figures["sessions"])
