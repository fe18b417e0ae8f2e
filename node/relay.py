"""Serve other people's sessions: the shell around ``protocol/hop.py`` and the engine.

A session lives as long as the control stream on which its originator opened it, and for ``LINGER``
seconds without one: an originator that comes back in time opens the same session again, on another
stream, and everything is as it was. Its tasks are children of the first stream's handler: one holds
the control stream of the time, one sends onward, one watches the clock. Steps come in on a second
stream, the predecessor's link, whose handler only feeds the hop; so a link may break and come again
without the session noticing.

A token costs few turns of the event loop, as each of them is paid at every hop: a step goes to the
engine in the turn in which its frame was read, and its result goes into the log and onto the wire in
the turn in which torch's thread has given it. A task sends what cannot leave at once.
"""

import collections
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial

import trio

from ..inference.engine import Engine, Priority
from ..protocol.admission import Admission, AdmissionLimits, NotAdmitted, Ticket
from ..protocol.checks import MAX_PLAIN_FRAME, Peer
from ..protocol.codec import max_frame, max_rows
from ..protocol.errors import (
    CacheFull,
    ErrorCode,
    LocalProtocolError,
    PeerError,
    PetalsError,
    RemoteProtocolError,
)
from ..protocol.frames import (
    SESSION_PROTOCOL,
    Close,
    Failed,
    Frame,
    Hello,
    Link,
    Open,
    Probe,
    Ready,
    Refused,
    Relink,
    Resume,
    State,
    Step,
)
from ..protocol.hop import (
    IDLE_TIMEOUT,
    Compute,
    Computed,
    DialSuccessor,
    Event,
    Hop,
    Linked,
    Refusal,
    Reopened,
    Reply,
    SuccessorLost,
    Welcome,
    check_open,
    offered_keys,
    same_session,
    shares_prefixes,
)
from ..protocol.span import Span
from ..protocol.tensor import WireTensor
from .frame_stream import FrameStream, failed, open_frame_stream, refused
from .network import Network, Stream
from .outbox import Outbox
from .wakeup import Signal, open_flat_nursery, wait_future, when_done

logger = logging.getLogger(__name__)

STEP_ROWS = 128
"""Rows per sequence of a step when more are at hand: small enough that hops work at the same time
on different parts of a long prompt, large enough to keep the matrix products efficient."""
QUEUED_STEPS = 2
"""Steps of one session taken in but not computed; more wait in the predecessor's stream."""
LINK_PATIENCE = 10.0
"""Seconds that an early link waits for the session's ``open`` or ``relink``, which come from the
originator on another connection."""
FIRST_FRAME_TIMEOUT = 10.0
"""Seconds for a new stream to say what it is for."""
LINGER = 10.0
"""Seconds for which a session is kept without its originator: a connection that broke is dialled
again at once, and whoever is not back by then has gone. Sessions that linger give way to others."""
LINK_ATTEMPTS = 4
LINK_RETRY_DELAY = 0.25
"""Seconds before a broken link to the successor is dialled again; doubles each time."""
LAST_WORD_TIMEOUT = 1.0


class RelayedSession:
    """One session at this hop, shared by its control stream and its link."""

    def __init__(
        self,
        opened: Open,
        control: FrameStream,
        hop: Hop,
        ticket: Ticket,
        submit: Callable[["RelayedSession", Compute], None],
    ) -> None:
        self.opened = opened
        self.control = control
        """The stream to the originator, or what is left of the last one."""
        self.control_scope = trio.CancelScope()
        self.control_taken = trio.Event()
        """Set when another stream has taken the place of ``control``."""
        self.lingering_since: float | None = None
        self.hop = hop
        self.ticket = ticket
        self._submit = submit
        self.outbox = Outbox()
        self.room = Signal()
        """There may be room for steps."""
        self.steps: collections.deque[Compute] = collections.deque()
        """In the engine."""
        self.scope = trio.CancelScope()
        self.link_scope = trio.CancelScope()
        self.successor_scope = trio.CancelScope()
        self.closed = trio.Event()
        self.ending: Failed | None = None
        """What to tell the originator at the end, if it is not the originator that ends it."""
        self.mistake: Exception | None = None
        """What has gone wrong with a result, for the session's own task to raise."""

    @property
    def busy(self) -> bool:
        """Whether a step is being computed or waits to be."""
        return bool(self.steps)

    @property
    def full(self) -> bool:
        """Whether steps have to wait for others to be computed."""
        return len(self.steps) >= QUEUED_STEPS or self.ticket.backlogged

    @property
    def over(self) -> bool:
        """Whether results do not matter any more."""
        return self.scope.cancel_called or self.closed.is_set()

    def receive(self, event: Event) -> list[Reply]:
        """Tell the hop and do what it asks for; returns what the caller is to send back."""
        replies: list[Reply] = []
        for effect in self.hop.receive(event, trio.current_time()):
            if isinstance(effect, Reply):
                replies.append(effect)
            elif isinstance(effect, Compute):
                self.steps.append(effect)
                self.ticket.took_in(len(effect.step.hidden.data))
                self._submit(self, effect)
            elif isinstance(effect, DialSuccessor):
                self.successor_scope.cancel()
        if not isinstance(event, Step):  # which has changed nothing yet
            self.room.notify()
            self.outbox.notify()
        return replies

    def reopen(self, opened: Open, control: FrameStream) -> None:
        """The originator has come back, on another stream."""
        self.control = control
        self.control_taken.set()
        self.control_taken = trio.Event()
        self.control_scope.cancel()  # an older stream, if it has not broken yet
        if self.hop.successor is None:
            self.successor_scope.cancel()  # outputs go to the new stream
        self.receive(Reopened(opened))

    def end(self, last_word: Failed) -> None:
        """End the session from our side."""
        self.ending = last_word
        self.scope.cancel()


class Relay:
    """The sessions that pass through this node's span."""

    def __init__(
        self,
        network: Network,
        engine: Engine,
        *,
        model: str,
        span: Span,
        hidden_size: int,
        hello: Hello,
        limits: AdmissionLimits,
        retiring: Sequence["Relay"] = (),
        on_load_change: Callable[[], None],
    ) -> None:
        """``retiring``: relays of other blocks, whose sessions' streams end there."""
        self._network = network
        self._engine = engine
        self._model = model
        self._span = span
        self._hidden_size = hidden_size
        self._hello = hello
        self._retiring = retiring
        self._on_load_change = on_load_change
        self._admission = Admission(
            limits,
            own_peer_id=network.peer_id,
            cache_tokens=engine.statistics().cache_tokens_total,
        )
        self.refusals: collections.Counter[ErrorCode] = collections.Counter()
        """How often sessions and links were refused, and why."""
        self._sessions: dict[bytes, RelayedSession] = {}
        self._opening: set[bytes] = set()
        """Sessions whose prefix is being restored."""
        self._changed = Signal()
        self._drained = Signal()
        """Somebody's backlog has become shorter."""
        self._leaving = ""
        """Why, if no session is taken in any more."""

    @property
    def sessions(self) -> int:
        """Sessions open now."""
        return len(self._sessions)

    @property
    def session_blocks(self) -> int:
        """The blocks that they run, over all of them."""
        return sum(len(session.opened.span) for session in self._sessions.values())

    async def handle(self, stream: Stream) -> None:
        """Serve one inbound stream of the session protocol."""
        frames = FrameStream(stream, self._hello, limit=MAX_PLAIN_FRAME)
        try:
            first = None
            with trio.move_on_after(FIRST_FRAME_TIMEOUT):
                first = await frames.receive()
            if isinstance(first, Open):
                await self._relay_of(first.session)._serve_session(frames, first)
            elif isinstance(first, Link):
                await self._relay_of(first.session)._serve_link(frames, first)
            elif first is not None:
                raise RemoteProtocolError(f"a session begins with open or link, not {first.KIND}")
        except Refusal as refusal:
            await self._refuse(frames, refused(refusal.code, str(refusal)))
        except (CacheFull, NotAdmitted) as full:
            await self._refuse(frames, refused(ErrorCode.BUSY, str(full), full.retry_after))
        except RemoteProtocolError as error:
            logger.warning("peer %s broke the protocol: %s", frames.peer_id, error)
            await _say(frames, failed(ErrorCode.PROTOCOL, str(error)))
        except PeerError as error:
            logger.debug("stream of %s ended: %s", frames.peer_id, error)

    def _relay_of(self, session: bytes) -> "Relay":
        return next((old for old in self._retiring if session in old._sessions), self)

    async def _refuse(self, frames: FrameStream, frame: Refused) -> None:
        self.refusals[frame.code] += 1
        await _say(frames, frame)

    async def leave(self, patience: float, reason: str) -> None:
        """Refuse new sessions, and hand over each running one when no step of it is under way.

        Originators look for somebody else as soon as they are told. Those whose step takes longer
        than ``patience`` seconds are told in the middle of it.
        """
        self._leaving = reason
        farewell = failed(ErrorCode.LEAVING, reason)
        with trio.move_on_after(patience):
            while self._sessions:
                for session in list(self._sessions.values()):
                    if not session.busy and not session.over:
                        session.end(farewell)
                await self._changed.wait()
        for session in list(self._sessions.values()):
            session.end(farewell)
        with trio.move_on_after(patience):
            while self._sessions:
                await self._changed.wait()

    # --- a session, on its control stream -----------------------------------------------------

    async def _serve_session(self, control: FrameStream, opened: Open) -> None:
        if self._leaving:
            raise Refusal(ErrorCode.LEAVING, self._leaving)
        rows = max_rows(opened.batch, self._hidden_size, opened.wire_dtype)
        check_open(opened, model=self._model, span_served=self._span, max_rows=rows)
        old = await self._find(opened, control.peer_id)
        if old is not None:
            await self._reopen(old, opened, control)
            return
        if opened.session in self._opening:
            raise Refusal(ErrorCode.BAD_REQUEST, "a session of this id is being opened already")
        ticket = await self._reserve(opened, control.peer_id)
        restored = await self._restore(opened, ticket)
        hop = Hop(opened, hidden_size=self._hidden_size, now=trio.current_time(), restored=restored)
        await self._run_session(RelayedSession(opened, control, hop, ticket, self._submit), rows)

    async def _find(self, opened: Open, peer_id: str) -> RelayedSession | None:
        """The session that an originator opens again; one on other terms has to go first."""
        old = self._sessions.get(opened.session)
        if old is None:
            return None
        if old.control.peer_id != peer_id or opened.epoch <= old.hop.epoch:
            raise Refusal(ErrorCode.BAD_REQUEST, "a session of this id is open already")
        if same_session(old.opened, opened) and not old.over:
            return old
        old.scope.cancel()
        await old.closed.wait()
        return None

    async def _reopen(self, session: RelayedSession, opened: Open, control: FrameStream) -> None:
        """Give the session this stream for as long as no other comes; its own task reads it."""
        session.reopen(opened, control)
        taken = session.control_taken
        self._changed.notify()  # a link may have been waiting for this epoch
        async with open_flat_nursery() as nursery:

            async def watch(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch, taken)
            nursery.start_soon(watch, session.closed)

    async def _reserve(self, opened: Open, peer_id: str) -> Ticket:
        """Find room for a session; those that linger give way to it, the oldest first."""
        while True:
            try:
                return self._take_room(opened, peer_id)
            except (CacheFull, NotAdmitted) as full:
                whose = full.peer_id if isinstance(full, NotAdmitted) else None
                lingering = [
                    session
                    for session in self._sessions.values()
                    if session.lingering_since is not None
                    and whose in (None, session.control.peer_id)
                ]
                if not lingering or full.retry_after is None:
                    raise
                oldest = min(lingering, key=lambda session: session.lingering_since or 0.0)
                oldest.scope.cancel()
                await oldest.closed.wait()

    def _take_room(self, opened: Open, peer_id: str) -> Ticket:
        own = self._network.peer_id
        ours = peer_id == own
        ticket = self._admission.admit(peer_id, cache_tokens=opened.batch * opened.max_tokens)
        try:
            self._engine.open(
                opened.session,
                batch=opened.batch,
                max_tokens=opened.max_tokens,
                padding=opened.padding,
                originator=peer_id,
                priority=Priority.OWN if ours else Priority.NORMAL,
                sampled_here=ours and opened.predecessor == own and opened.successor is None,
                prefixes=shares_prefixes(opened),
            )
        except BaseException:
            ticket.release()
            raise
        return ticket

    def _free(self, session_id: bytes, ticket: Ticket) -> None:
        """Give back what ``_take_room`` has taken."""
        self._engine.close(session_id)
        ticket.release()
        self._drained.notify()

    async def _restore(self, opened: Open, ticket: Ticket) -> WireTensor | None:
        """What we hold already of the prefix that was offered: outputs [1, rows, hidden_size]."""
        if not opened.prefix:
            return None
        self._opening.add(opened.session)
        restoring = self._engine.restore(
            opened.session,
            offered_keys(opened),
            wire_dtype=opened.wire_dtype,
            span=opened.span,
        )
        try:
            return (await wait_future(restoring)).outputs
        except BaseException:
            self._free(opened.session, ticket)
            raise
        finally:
            self._opening.remove(opened.session)

    async def _run_session(self, session: RelayedSession, rows: int) -> None:
        opened = session.opened
        self._sessions[opened.session] = session
        self._changed.notify()
        self._on_load_change()
        try:
            with session.scope:
                async with open_flat_nursery() as nursery:
                    nursery.start_soon(self._send_onward, session, min(rows, STEP_ROWS))
                    nursery.start_soon(self._watch_idle, session)
                    await self._hold_control(session)
                    nursery.cancel_scope.cancel()
        except RemoteProtocolError as error:
            logger.warning("peer %s broke the protocol: %s", session.control.peer_id, error)
            session.ending = failed(ErrorCode.PROTOCOL, str(error))
        finally:
            session.link_scope.cancel()
            # Before ``closed``: the id may be opened again then.
            self._free(opened.session, session.ticket)
            del self._sessions[opened.session]
            if session.ending is not None:
                await _say(session.control, session.ending)
            session.closed.set()  # which ends the stream that we have just spoken on
            self._changed.notify()
            self._on_load_change()
        if session.mistake is not None:
            raise session.mistake

    async def _hold_control(self, session: RelayedSession) -> None:
        """Until the originator closes the session, or has not come back for ``LINGER`` seconds."""
        while True:
            control = session.control
            with trio.CancelScope() as session.control_scope:
                try:
                    left = self._engine.statistics()
                    await control.send(
                        Ready(session.hop.epoch, left.cache_tokens_total - left.cache_tokens_used)
                    )
                    if await self._read_control(session, control):
                        return
                except PeerError as error:
                    logger.info("stream of originator %s broke: %s", control.peer_id, error)
            await control.close()  # whoever comes back brings another
            if session.control is not control:
                continue
            taken, session.lingering_since = session.control_taken, trio.current_time()
            with trio.move_on_after(LINGER) as lingering:
                await taken.wait()
            session.lingering_since = None
            if lingering.cancelled_caught:
                return

    async def _read_control(self, session: RelayedSession, control: FrameStream) -> bool:
        """Until the stream ends; whether the originator has closed the session."""
        while True:
            frame = await control.receive()
            if frame is None or isinstance(frame, Close):
                return frame is not None
            if not isinstance(frame, Relink | Probe):
                raise RemoteProtocolError(f"{frame.KIND} has no place on a control stream")
            for reply in session.receive(frame):
                await control.send(self._with_passes(reply.frame))
            if isinstance(frame, Relink):
                self._changed.notify()  # a link may have been waiting for this epoch

    def _with_passes(self, frame: Resume | State) -> Frame:
        """A hop knows nothing of what its node does for others."""
        if isinstance(frame, State):
            return replace(frame, passes=self._engine.blocks.passes)
        return frame

    def _submit(self, session: RelayedSession, compute: Compute) -> None:
        step, opened = compute.step, session.opened
        future = self._engine.submit(
            opened.session,
            position=step.position,
            hidden=step.hidden,
            wire_dtype=opened.wire_dtype,
            span=opened.span,
            keys=compute.labels,
            order=step.order,
        )
        when_done(future, partial(self._take_result, session, compute, future))

    def _take_result(
        self, session: RelayedSession, compute: Compute, future: "Future[WireTensor]"
    ) -> None:
        """The engine has computed a step; never raises."""
        if session.over:
            return
        try:
            hidden = future.result()
        except (PetalsError, CancelledError) as error:
            logger.warning("session of %s failed: %s", session.control.peer_id, error)
            # what cannot be computed because of its input is the fault of whoever sent it
            blamed = session.hop.predecessor if isinstance(error, RemoteProtocolError) else None
            session.end(failed(ErrorCode.COMPUTE, str(error), blamed))
            return
        session.steps.popleft()
        backlogged = session.ticket.backlogged
        session.ticket.computed(len(compute.step.hidden.data))
        if backlogged:
            self._drained.notify()
        try:
            session.receive(Computed(compute.step, hidden, compute.labels))
        except Exception as error:  # noqa: BLE001 - raised here it would end the whole program
            session.mistake = error
            session.scope.cancel()
        if self._leaving:
            self._changed.notify()

    async def _watch_idle(self, session: RelayedSession) -> None:
        deadline = session.hop.next_deadline()
        while deadline > trio.current_time():
            await trio.sleep_until(deadline)
            deadline = session.hop.next_deadline()
        session.end(failed(ErrorCode.TIMEOUT, f"session idle for {IDLE_TIMEOUT:.0f} s"))

    # --- onward: to the successor, or back to the originator ----------------------------------

    async def _send_onward(self, session: RelayedSession, rows: int) -> None:
        while True:
            with trio.CancelScope() as session.successor_scope:
                if session.hop.successor is None:
                    await self._send_back(session, rows)
                else:
                    await self._link_successor(session, session.hop.successor, rows)

    async def _send_back(self, session: RelayedSession, rows: int) -> None:
        """To the originator, until there is another stream to it (which cancels this)."""
        try:
            await self._send_outgoing(session, session.control, rows)
        except PeerError as error:
            logger.debug("outputs for %s wait: %s", session.control.peer_id, error)
        await trio.sleep_forever()

    async def _send_outgoing(self, session: RelayedSession, stream: FrameStream, rows: int) -> None:
        scope = session.successor_scope

        def next_frame() -> Frame | None:
            # What is due is due on the newest stream: one that is being given up must not take it along.
            return None if scope.cancel_called else session.hop.next_outgoing(rows)

        await session.outbox.run(stream, next_frame)

    async def _link_successor(self, session: RelayedSession, successor: Peer, rows: int) -> None:
        """Keep a link to ``successor`` until it is relinked (which cancels this)."""
        attempts = 0
        while True:
            try:
                await self._run_link(session, successor, rows)
            except (PeerError, RemoteProtocolError) as error:
                logger.info("link to %s broke: %s", successor.peer_id, error)
                reason = str(error)
            attempts = 1 if session.hop.successor_linked else attempts + 1
            session.receive(SuccessorLost())
            if attempts >= LINK_ATTEMPTS:
                await _say(
                    session.control, failed(ErrorCode.UNREACHABLE, reason, successor.peer_id)
                )
                await trio.sleep_forever()  # until the originator relinks, comes back, or closes
            await trio.sleep(LINK_RETRY_DELAY * 2 ** (attempts - 1))

    async def _run_link(self, session: RelayedSession, successor: Peer, rows: int) -> None:
        """One life of the link; always ends in PeerError or RemoteProtocolError."""
        session.receive(SuccessorLost())  # whatever the link before this one has still said
        stream = await open_frame_stream(
            self._network, successor.peer_id, successor.multiaddrs, SESSION_PROTOCOL, self._hello
        )
        try:
            await stream.send(Link(session.opened.session, session.hop.epoch))
            async with open_flat_nursery() as nursery:
                nursery.start_soon(self._send_outgoing, session, stream, rows)
                while True:
                    frame = await stream.receive()
                    if isinstance(frame, Resume):
                        session.receive(frame)
                        continue
                    if isinstance(frame, Refused | Failed):
                        raise PeerError(frame.reason, code=frame.code, peer_id=successor.peer_id)
                    said = "closed the link" if frame is None else f"sent {frame.KIND} on it"
                    raise PeerError(f"peer {successor.peer_id} {said}", peer_id=successor.peer_id)
        finally:
            await stream.close()

    # --- in: the predecessor's link -----------------------------------------------------------

    async def _serve_link(self, stream: FrameStream, link: Link) -> None:
        session = await self._welcome(stream.peer_id, link)
        session.link_scope.cancel()  # a predecessor that links again has lost the link before
        opened = session.opened
        stream.allow(  # one step cannot have more rows than the session
            max_frame(opened.max_tokens, opened.batch, self._hidden_size, opened.wire_dtype)
        )
        with trio.CancelScope() as session.link_scope:
            try:
                for reply in session.receive(Linked()):
                    await stream.send(reply.frame)
                await self._read_link(session, stream)
            except RemoteProtocolError as error:
                await _say(session.control, failed(ErrorCode.PROTOCOL, str(error), stream.peer_id))
                raise

    async def _welcome(self, peer_id: str, link: Link) -> RelayedSession:
        with trio.move_on_after(LINK_PATIENCE):
            while True:
                session = self._sessions.get(link.session)
                if session is not None:
                    welcome = session.hop.link_welcome(peer_id, link.epoch)
                    if welcome is Welcome.ACCEPT:
                        return session
                    if welcome is Welcome.REFUSE:
                        break
                await self._changed.wait()
        raise Refusal(ErrorCode.UNKNOWN_SESSION, "no session here that you are to link to")

    async def _read_link(self, session: RelayedSession, stream: FrameStream) -> None:
        scope, replies = session.link_scope, list[Reply]()

        def take(frame: Frame) -> bool:
            """In the turn in which it came; whether there is no more to do about it."""
            if scope.cancel_called or session.over or session.full or not isinstance(frame, Step):
                return False
            replies.extend(session.receive(frame))
            return not replies

        while True:
            frame = await stream.receive(take)
            if frame is None:
                return
            if not isinstance(frame, Step):
                raise RemoteProtocolError(f"{frame.KIND} has no place on a link")
            if not replies:
                while len(session.steps) >= QUEUED_STEPS:
                    await session.room.wait()
                while session.ticket.backlogged:
                    await self._drained.wait()
                replies += session.receive(frame)
            while replies:
                await stream.send(replies.pop(0).frame)


async def _say(stream: FrameStream, frame: Refused | Failed) -> None:
    """Tell the peer, if it still listens; a short last word, also while being cancelled."""
    with trio.move_on_after(LAST_WORD_TIMEOUT, shield=True):
        try:
            await stream.send(frame)
        except (PeerError, LocalProtocolError) as error:
            logger.debug("could not tell %s: %s", stream.peer_id, error)
