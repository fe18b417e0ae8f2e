"""One round: some steps of several sessions, run through the blocks as one ragged batch.

Rules of this file: it runs on torch's thread and under no lock. What one step brings in or gives
out never harms another: inputs and outputs are checked for the batch as a whole, and step by step
only if something is wrong. What is handed out is never a view of the batch, which would keep all of
it in memory for the sake of a row, and whose memory the blocks may use again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..protocol.errors import LocalProtocolError, ModelError, PetalsError, RemoteProtocolError
from ..protocol.log import fits
from ..protocol.tensor import DType, WireTensor
from .attention import LaneRows
from .model import Blocks
from .schedule import Share
from .steps import Step
from .tensors import is_finite, to_bytes, to_torch, to_wire, torch_dtype


@dataclass(slots=True)
class Outcome:
    """What a round brought. Steps in neither dictionary go on in a later round, or never began."""

    results: dict[Step, WireTensor] = field(default_factory=dict)
    errors: dict[Step, PetalsError] = field(default_factory=dict)
    rows: int = 0
    """Computed, without padding."""


class Rounds:
    """Runs rounds on ``blocks``.

    A step is **plain** if it is one row per sequence and none of them is padding: the usual token.
    Others are **buffered**: they have tensors of all their rows from their first round to the last.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    @torch.inference_mode()
    def run(self, shares: Sequence[Share[Step]]) -> Outcome:
        """Start the steps that are new and compute their shares; all are of one span.

        A step with an error has changed nothing if it was not ``started``, and has left its session
        at the step's position otherwise.
        """
        outcome = Outcome()
        ready: list[Share[Step]] = []
        for share in shares:
            try:
                if share.step.started or self._start(share.step):
                    ready.append(share)
            # torch reports memory and device errors in many classes; none may end the thread.
            except Exception as error:  # noqa: BLE001
                outcome.errors[share.step] = _as_ours(share.step, error)
        # Plain ones in front, so that their rows are one piece of the batch.
        plain = [share.step for share in ready if share.step.input is None]
        rows = None
        if plain:
            try:
                plain, rows = self._decode(plain, outcome)
            except Exception as error:  # noqa: BLE001
                outcome.errors.update((step, _as_ours(step, error)) for step in plain)
                plain = []
        for step in plain:
            _begin(step)
        pieces = [_Piece(share) for share in ready if share.step.input is not None]
        self._compute(plain, rows, pieces, outcome)
        return outcome

    def _start(self, step: Step) -> bool:
        """Check a new step against its session; False if its owner doesn't want it any more."""
        if not step.future.set_running_or_notify_cancel():
            return False
        self._check(step)
        cache, shape = step.owner.cache, step.hidden.shape
        padded = step.position < cache.unpadded_from
        if step.rows > 1 or padded:
            dtype, device = self._blocks.dtype, self._blocks.device
            hidden = to_torch(step.hidden, dtype=dtype, device=device)
            if not is_finite(hidden):
                raise _poison()
            make = torch.zeros if padded else torch.empty
            step.input = hidden
            step.output = make(shape, dtype=torch_dtype(step.wire_dtype), device=device)
            cache.expect(step.position + step.rows)
            _begin(step)
        elif step.order:
            _begin(step)  # here, because copying lanes may fail for want of memory
        return True

    def _check(self, step: Step) -> None:
        session, cache, shape = step.owner, step.owner.cache, step.hidden.shape
        blocks = self._blocks
        if len(shape) != 3 or shape[0] != len(cache.lanes) or shape[2] != blocks.hidden_size:
            raise LocalProtocolError(
                f"hidden states must be [{len(cache.lanes)}, rows, {blocks.hidden_size}], "
                f"got shape {shape}"
            )
        if not blocks.span.covers(step.span) or (session.span or step.span) != step.span:
            raise LocalProtocolError(
                f"blocks {step.span} were asked for; loaded are {blocks.span}"
                + (f", and the session uses {session.span}" if session.span else "")
            )
        if step.order and not fits(step.order, cache.padding):
            raise LocalProtocolError(
                f"rows {list(step.order)} cannot take the places of a batch with padding "
                f"{list(cache.padding)}"
            )
        end = step.position + shape[1]
        if not 0 <= step.position <= cache.position:
            raise LocalProtocolError(
                f"a step at position {step.position} leaves a gap: the session holds "
                f"{cache.position} tokens"
            )
        if end > cache.max_tokens:
            raise LocalProtocolError(f"{end} tokens in a session opened for {cache.max_tokens}")
        if step.keys and any(not step.position < at <= end for at, _ in step.keys):
            raise LocalProtocolError(
                f"a step from position {step.position} to {end} cannot have keys for "
                f"{[at for at, _ in step.keys]}"
            )

    def _decode(
        self, plain: list[Step], outcome: Outcome
    ) -> tuple[list[Step], torch.Tensor | None]:
        """Those of ``plain`` that can be computed, and their inputs ``[rows, hidden]``."""
        wires = [step.hidden for step in plain]
        width, dtype = self._blocks.hidden_size, wires[0].dtype
        if len(wires) > 1 and all(wire.dtype is dtype for wire in wires):
            # Joining bytes costs far less than making a tensor of each.
            count = sum(step.batch for step in plain)
            wires = [WireTensor(dtype, (count, width), b"".join([wire.data for wire in wires]))]
        tensors = [
            to_torch(wire, dtype=self._blocks.dtype, device=self._blocks.device).view(-1, width)
            for wire in wires
        ]
        rows = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        # Where nothing is cut, there is time to look when something is wrong with the output.
        cut = any(step.position < step.owner.cache.position for step in plain)
        if not cut or is_finite(rows):
            return plain, rows
        good, finite = [], []
        for step, own in _split(rows, plain):
            if is_finite(own):
                good.append(step)
                finite.append(own)
            else:
                outcome.errors[step] = _poison()
        return good, torch.cat(finite) if finite else None

    def _compute(
        self,
        plain: Sequence[Step],
        rows: torch.Tensor | None,
        pieces: "Sequence[_Piece]",
        outcome: Outcome,
    ) -> None:
        """Run one batch: plain steps, ``rows`` ``[rows, hidden]`` in, and pieces of others."""
        if not plain and not pieces:
            return
        try:
            batch = self._run_batch(plain, rows, pieces)
        except Exception as error:  # noqa: BLE001
            if len(plain) + len(pieces) > 1:  # find out whose fault it is
                for step, own in _split(rows, plain):
                    self._compute([step], own, [], outcome)
                for piece in pieces:
                    self._compute([], None, [piece], outcome)
                return
            step = plain[0] if plain else pieces[0].step
            step.owner.cache.truncate(step.position)
            outcome.errors[step] = _as_ours(step, error)
            return
        ends = [(step, 1) for step in plain] + [(piece.step, piece.end) for piece in pieces]
        for step, end in ends:
            result = batch.get(step)
            if isinstance(result, PetalsError):
                step.owner.cache.truncate(step.position)
                outcome.errors[step] = result
                continue
            step.done = end
            step.owner.cache.advance(step.position + end)
            if result is not None:
                outcome.results[step] = result
        outcome.rows += sum(step.batch for step in plain) + sum(piece.size for piece in pieces)

    def _run_batch(
        self, plain: Sequence[Step], rows: torch.Tensor | None, pieces: "Sequence[_Piece]"
    ) -> dict[Step, WireTensor | PetalsError]:
        """What comes out for every step that this batch completes or that cannot go on.

        Raises whatever torch raises; no session has changed then.
        """
        lanes = [LaneRows(lane, 1) for step in plain for lane in step.owner.cache.lanes]
        inputs = [] if rows is None else [rows]
        for piece in pieces:
            lanes += piece.lanes
            inputs += piece.inputs
        if inputs:
            hidden = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
            span = plain[0].span if plain else pieces[0].step.span
            output = self._blocks.run(hidden[None], self._blocks.plan(lanes), span)[0]
        else:  # nothing but padding
            output = torch.empty((0, self._blocks.hidden_size))
        outputs: Sequence[torch.Tensor] = (output,)
        if pieces:
            outputs = output.split([0 if rows is None else len(rows), *(p.size for p in pieces)])
        batch = _encode(outputs[0], plain)
        for piece, own in zip(pieces, outputs[1:], strict=True):
            piece.take(own, batch)
        if not is_finite(output):
            owners = [*_split(outputs[0], plain)]
            owners += [(piece.step, own) for piece, own in zip(pieces, outputs[1:], strict=True)]
            for step, own in owners:
                if not is_finite(own):
                    batch[step] = _not_finite(step)
        return batch


class _Piece:
    """The rows of a buffered step in one round."""

    def __init__(self, share: Share[Step]) -> None:
        step = share.step
        assert step.input is not None and step.output is not None
        cache, begin, end = step.owner.cache, step.done, step.done + share.rows
        self.step = step
        self.end = end
        self.lanes: list[LaneRows] = []
        self.inputs: list[torch.Tensor] = []
        """Per lane ``[rows, hidden]``, padding left out."""
        self._places: list[torch.Tensor] = []
        for lane, lane_cache in enumerate(cache.lanes):
            first = begin + cache.padding_rows(lane, step.position + begin, end - begin)
            if first < end:
                self.lanes.append(LaneRows(lane_cache, end - first))
                self.inputs.append(step.input[lane, first:end])
                self._places.append(step.output[lane, first:end])
        self.size = sum(len(rows) for rows in self.inputs)

    def take(self, output: torch.Tensor, batch: dict[Step, WireTensor | PetalsError]) -> None:
        """Keep the piece's ``output`` ``[size, hidden]``; the last piece completes its step."""
        step = self.step
        assert step.output is not None
        for place, rows in zip(
            self._places, output.split([len(place) for place in self._places]), strict=True
        ):
            place.copy_(rows)
        if self.end == step.rows:
            if _narrows(output, step.wire_dtype) and not is_finite(step.output):
                batch[step] = _too_large(step)
            else:
                batch[step] = to_wire(step.output, step.wire_dtype)


def _begin(step: Step) -> None:
    """From here on the session holds what is before ``step``, and nothing behind."""
    session = step.owner
    if step.started:
        return
    step.started = True
    session.span = step.span
    if step.position < session.cache.position:
        session.cache.truncate(step.position)
    session.cache.reorder(step.order)
    if session.shared is not None:
        session.shared.begin_step(step.position)


def _encode(output: torch.Tensor, plain: Sequence[Step]) -> dict[Step, WireTensor | PetalsError]:
    """The outputs ``[rows, hidden]`` of plain steps, each in its wire dtype."""
    batch: dict[Step, WireTensor | PetalsError] = {}
    for dtype in {step.wire_dtype for step in plain}:
        steps, rows = [*plain], output
        if any(step.wire_dtype is not dtype for step in plain):
            own = [pair for pair in _split(output, plain) if pair[0].wire_dtype is dtype]
            steps, rows = [step for step, _ in own], torch.cat([part for _, part in own])
        if _narrows(rows, dtype):
            rows = rows.to(torch_dtype(dtype))
            if not is_finite(rows):
                large = [step for step, part in _split(rows, steps) if not is_finite(part)]
                batch |= {step: _too_large(step) for step in large}
        data = to_bytes(rows, dtype)
        width, row_bytes = rows.shape[1], dtype.row_bytes(rows.shape[1])
        start = 0
        for step in steps:
            end = start + step.batch * row_bytes
            if step not in batch:
                batch[step] = WireTensor(dtype, (step.batch, 1, width), data[start:end])
            start = end
    return batch


def _split(rows: torch.Tensor | None, plain: Sequence[Step]) -> Iterator[tuple[Step, torch.Tensor]]:
    """Each plain step with its own of ``rows`` ``[rows, hidden]``."""
    if rows is not None:
        yield from zip(plain, rows.split([step.batch for step in plain]), strict=True)


def _narrows(tensor: torch.Tensor, dtype: DType) -> bool:
    """Whether finite values of ``tensor`` may become infinite in a wire dtype."""
    return torch_dtype(dtype) not in (torch.float32, tensor.dtype)


def _as_ours(step: Step, error: Exception) -> PetalsError:
    if isinstance(error, PetalsError):
        return error
    return ModelError(f"computing blocks {step.span} failed: {error}")


def _not_finite(step: Step) -> PetalsError:
    if step.input is None and not is_finite(to_torch(step.hidden)):
        return _poison()
    return ModelError(f"blocks {step.span} gave NaN or infinity")


def _too_large(step: Step) -> ModelError:
    return ModelError(f"the output of blocks {step.span} is too large for {step.wire_dtype}")


def _poison() -> RemoteProtocolError:
    return RemoteProtocolError("the hidden states received contain NaN or infinity")
