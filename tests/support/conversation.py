"""A whole session told in words: commands in, one line out for every frame and effect.

Everything travels as bytes, in order and at once, unless a command says otherwise. A token is a
letter, and a hop's forward pass is the next letter of the alphabet for every block that it runs:
over six blocks ``a`` comes back as ``g``. Peers keep what their hops have labelled, and restore it
when it is offered.
"""

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from petals.protocol import prefix
from petals.protocol.chain import (
    Chain,
    ChainHop,
    Closed,
    Deliver,
    DropHop,
    HopCut,
    HopLost,
    HopReady,
    HopState,
    LinkFirst,
    OpenHop,
    ProbeHop,
    RelinkHop,
    Returned,
    Routed,
    SessionTerms,
    Ticked,
)
from petals.protocol.chain import Effect as ChainEffect
from petals.protocol.chain import Event as ChainEvent
from petals.protocol.checks import Peer
from petals.protocol.codec import FrameDecoder, encode
from petals.protocol.frames import (
    Close,
    Frame,
    Link,
    Open,
    Output,
    Probe,
    Ready,
    Relink,
    Resume,
    State,
    Step,
)
from petals.protocol.hop import (
    Compute,
    Computed,
    DialSuccessor,
    Hop,
    Linked,
    Reopened,
    SuccessorLost,
    Welcome,
    offered_keys,
)
from petals.protocol.hop import Event as HopEvent
from petals.protocol.span import Span
from petals.protocol.tensor import DType
from support.sessions import HIDDEN_SIZE, SESSION, hidden, letters

ME = "me"
MAX_ROWS = 4

AFrame = TypeVar("AFrame", bound=Frame)


def show(frame: Frame) -> str:
    """A frame in one line."""
    match frame:
        case Open():
            onward = frame.successor.peer_id if frame.successor else ME
            offered = f", {len(frame.prefix)} prefixes offered" if frame.prefix else ""
            return (
                f"open epoch {frame.epoch}: blocks {frame.span}, "
                f"{frame.predecessor} > {onward}{offered}"
            )
        case Ready():
            return "ready"
        case Link():
            return f"link epoch {frame.epoch}"
        case Resume():
            return f"resume link {frame.link}: holds {frame.position} of rewind {frame.rewind}"
        case Step():
            vouched = f", {len(frame.vouched)} vouched for" if frame.vouched else ""
            return (
                f"step {frame.link}.{frame.sequence} rewind {frame.rewind}: {frame.position} "
                f"{letters(frame.hidden)!r}, wanted from {frame.want_from}{vouched}"
            )
        case Output():
            return f"output rewind {frame.rewind}: {frame.position} {letters(frame.hidden)!r}"
        case Relink():
            onward = frame.successor.peer_id if frame.successor else ME
            return f"relink epoch {frame.epoch}: {frame.predecessor} > {onward}"
        case Probe():
            return f"probe {frame.nonce}"
        case State():
            linked = "linked" if frame.successor_linked else "not linked"
            return (
                f"state {frame.nonce}: holds {frame.position}, has made {frame.produced}, {linked}"
            )
        case Close():
            return f"close: {frame.reason}"
    raise AssertionError(frame)


def over_the_wire(frame: AFrame) -> AFrame:
    (received,) = FrameDecoder().feed(b"".join(encode(frame)))
    assert isinstance(received, type(frame))
    return received


@dataclass
class Relay:
    """A hop and the steps that it has yet to compute."""

    hop: Hop
    outputs: str = ""
    to_compute: collections.deque[Compute] = field(default_factory=collections.deque)


class Conversation:
    """The world of one transcript."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._patch = pytest.MonkeyPatch()
        self._stores: dict[str, dict[bytes, str]] = collections.defaultdict(dict)
        """By peer and storage key, the outputs that it keeps."""
        self._now = 0.0
        self._again()

    def end(self) -> None:
        """Undo what ``share`` has done."""
        self._patch.undo()

    def _again(self) -> None:
        """``again``: another session, with the same peers."""
        self._tokens = ""
        self._relays: dict[str, Relay] = {}
        self._links: dict[str, str] = {}
        """Sender -> receiver of every link that stands."""
        self._broken: set[str] = set()
        """Whose link onward cannot be opened at the moment."""
        self._silent: set[str] = set()
        self._stalled: set[str] = set()
        """Who neither computes nor says anything any more."""
        terms = SessionTerms(
            session=SESSION,
            model="f00d",
            span=Span(0, 6),
            hidden_size=HIDDEN_SIZE,
            batch=1,
            padding=(0,),
            max_tokens=40,
            wire_dtype=DType.FLOAT16,
        )
        self._chain = Chain(terms, own_peer_id=ME, now=self._now)

    def do(self, command: str) -> list[str]:
        """Carry ``command`` out; returns the lines of what happened."""
        commands: dict[str, Callable[..., None]] = {
            "route": self._route,
            "append": self._append,
            "rewind": self._rewind,
            "run": self._run,
            "lose": self._lose,
            "break": self._break,
            "cut": self._cut,
            "restart": self._restart,
            "mend": self._broken.remove,
            "hang": self._silent.add,
            "stall": self._stalled.add,
            "wait": self._wait,
            "show": self._show,
            "close": self._close,
            "share": self._share,
            "again": self._again,
        }
        verb, *arguments = command.split()
        self.lines = []
        commands[verb](*arguments)
        return self.lines

    # --- commands ---------------------------------------------------------------------------

    def _route(self, *hops: str) -> None:
        """``route A=0:2 B=2:4``: hops for what is missing."""
        pairs = [hop.split("=") for hop in hops]
        inputs = prefix.HashedInputs(HIDDEN_SIZE, DType.FLOAT16)
        if self._tokens:
            inputs.take(0, len(self._tokens), hidden(self._tokens).data)
        new = [ChainHop(Peer(name), Span.parse(span)) for name, span in pairs]
        self._receive(Routed(new, inputs.digests))

    def _share(self, rows: str) -> None:
        """``share 2``: there is a boundary behind every second row."""
        self._patch.setattr(prefix, "PREFIX_ROWS", int(rows))

    def _append(self, tokens: str, _want: str, wanted: str) -> None:
        """``append abc want 1``: three tokens, and the last row is to come back."""
        self._tokens += tokens
        self._chain.append(len(tokens), want_from=len(self._tokens) - int(wanted), now=self._now)

    def _rewind(self, position: str) -> None:
        self._chain.rewind(int(position))
        self._tokens = self._tokens[: int(position)]

    def _lose(self, peer_id: str) -> None:
        self._receive(HopLost(peer_id, "gone"))

    def _break(self, sender: str) -> None:
        """``break A``: A's link to its successor breaks and cannot be opened before ``mend A``."""
        self._broken.add(sender)
        del self._links[sender]
        self._tell(sender, SuccessorLost())

    def _cut(self, peer_id: str) -> None:
        """``cut A``: the originator's stream to A breaks; A lives."""
        self._receive(HopCut(peer_id, "reset"))

    def _restart(self, peer_id: str) -> None:
        """``restart A``: A is there again, with nothing of what it held."""
        self._drop(peer_id)
        self._receive(HopCut(peer_id, "reset"))

    def _wait(self, seconds: str) -> None:
        """``wait 20``: seconds pass, and the deadline if it is due."""
        self._now += float(seconds)
        self._receive(Ticked())

    def _show(self) -> None:
        self._say(repr(self._chain))
        for name in sorted(self._relays):
            self._say(f"{name}: {self._relays[name].hop!r}")

    def _close(self) -> None:
        self._receive(Closed("done"))

    def _run(self, *until: str) -> None:
        """Let everything happen that can; ``run until delivered``: up to a line that begins so."""
        while self._dial() or self._send() or self._compute():
            if until and self.lines and self.lines[-1].startswith(until[1]):
                return

    # --- what happens by itself -------------------------------------------------------------

    def _dial(self) -> bool:
        for name, relay in self._relays.items():
            successor = relay.hop.successor
            if successor and name not in self._links and name not in self._broken:
                self._link(name, successor.peer_id, relay.hop.epoch)
                return True
        return False

    def _send(self) -> bool:
        due = self._chain.next_due(MAX_ROWS)
        if due is not None:
            tokens = hidden(self._tokens[due.start : due.stop])
            frame = Step(
                due.link,
                due.sequence,
                due.rewind,
                due.start,
                self._chain.expected,
                tokens,
                past=due.past,
            )
            self._pass(ME, self._links[ME], frame)
            return True
        for name, relay in self._working():
            outgoing = relay.hop.next_outgoing(MAX_ROWS)
            if isinstance(outgoing, Step):
                self._pass(name, self._links[name], outgoing)
                return True
            if outgoing is not None:
                self._receive(Returned(name, self._carry(name, ME, outgoing)))
                return True
        return False

    def _compute(self) -> bool:
        for name, relay in self._working():
            if relay.to_compute and name not in self._stalled:
                compute = relay.to_compute.popleft()
                step, blocks = compute.step, len(relay.hop.opened.span)
                rows = "".join(chr(ord(row) + blocks) for row in letters(step.hidden))
                relay.outputs = relay.outputs[: step.position] + rows
                for position, key in compute.labels:
                    self._stores[name][key] = relay.outputs[:position]
                self._tell(name, Computed(step, hidden(rows), compute.labels))
                return True
        return False

    def _working(self) -> list[tuple[str, Relay]]:
        return [item for item in self._relays.items() if item[0] not in self._silent]

    # --- frames -----------------------------------------------------------------------------

    def _carry(self, sender: str, receiver: str, frame: AFrame) -> AFrame:
        self._say(f"{sender} -> {receiver}: {show(frame)}")
        return over_the_wire(frame)

    def _pass(self, sender: str, receiver: str, frame: Step | Relink | Probe) -> None:
        """Carry a frame to a relay, and its answers back."""
        received = self._carry(sender, receiver, frame)
        for answer in self._tell(receiver, received):
            self._answer(receiver, sender, answer)

    def _link(self, sender: str, receiver: str, epoch: int) -> None:
        link = self._carry(sender, receiver, Link(SESSION, epoch))
        welcome = self._relays[receiver].hop.link_welcome(sender, link.epoch)
        assert welcome is Welcome.ACCEPT, f"{receiver} lets {sender} {welcome.name}"
        self._links[sender] = receiver
        for answer in self._tell(receiver, Linked()):
            self._answer(receiver, sender, answer)

    def _answer(self, sender: str, receiver: str, frame: Resume | State) -> None:
        received = self._carry(sender, receiver, frame)
        if isinstance(received, State):
            self._receive(HopState(sender, received))
        elif receiver == ME:
            self._receive(received)
        else:
            self._tell(receiver, received)

    def _tell(self, name: str, event: HopEvent) -> list[Resume | State]:
        """Give a relay an event; returns its answers."""
        relay = self._relays[name]
        answers: list[Resume | State] = []
        for effect in relay.hop.receive(event, self._now):
            if isinstance(effect, Compute):
                relay.to_compute.append(effect)
            elif isinstance(effect, DialSuccessor):
                self._links.pop(name, None)
                self._broken.discard(name)
            else:
                answers.append(effect.frame)
        return answers

    def _receive(
        self,
        event: ChainEvent,
    ) -> None:
        for effect in self._chain.receive(event, self._now):
            self._perform(effect)

    def _perform(self, effect: ChainEffect) -> None:
        match effect:
            case OpenHop(peer, frame):
                opened = self._carry(ME, peer.peer_id, frame)
                if peer.peer_id in self._relays:
                    self._tell(peer.peer_id, Reopened(opened))
                    self._carry(peer.peer_id, ME, Ready(opened.epoch, 1000))
                    self._receive(HopReady(peer.peer_id))
                    return
                kept = [
                    self._stores[peer.peer_id][key]
                    for key in offered_keys(opened)
                    if key in self._stores[peer.peer_id]
                ]
                restored = hidden(kept[-1]) if kept else None
                hop = Hop(opened, hidden_size=HIDDEN_SIZE, now=self._now, restored=restored)
                self._relays[peer.peer_id] = Relay(hop, outputs=kept[-1] if kept else "")
                self._carry(peer.peer_id, ME, Ready(opened.epoch, 1000))
                self._receive(HopReady(peer.peer_id))
            case RelinkHop(peer_id, relink):
                self._pass(ME, peer_id, relink)
            case ProbeHop(peer_id, nonce):
                if peer_id in self._silent:
                    self._say(f"{ME} -> {peer_id}: {show(Probe(nonce))} (no answer)")
                else:
                    self._pass(ME, peer_id, Probe(nonce))
            case LinkFirst(peer, epoch):
                self._link(ME, peer.peer_id, epoch)
            case DropHop(peer_id, reason):
                self._carry(ME, peer_id, Close(reason))
                self._drop(peer_id)
            case Deliver(rows):
                self._say(f"delivered {letters(rows)!r}")

    def _drop(self, name: str) -> None:
        """The relay is gone; who was linked to it notices, and hopes for a relink."""
        del self._relays[name]
        self._links.pop(name, None)
        for sender in [sender for sender, receiver in self._links.items() if receiver == name]:
            del self._links[sender]
            if sender != ME:
                self._tell(sender, SuccessorLost())
                self._broken.add(sender)

    def _say(self, line: str) -> None:
        self.lines.append(line)
