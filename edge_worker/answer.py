"""A session's results as the answer to a request: text, pieces for Redis, usage and telemetry."""

from __future__ import annotations

from msgspec.structs import replace

from bus.protocol.messages import FinishReason, Message
from bus.store import ScoredToken, TelemetryEntry, Usage
from decoding.edge_events import Commit, Finish, WindowJudged
from edge_worker.output import DecidedEffect
from edge_worker.peers import Peer
from edge_worker.scores import Scorer
from edge_worker.text import AnswerText
from edge_worker.usage import UsageMeter, within
from edge_worker.watch import RequestWatch
from edge_worker.writer import Piece, ResultWriter


class AnswerOutput:
    """Turns tokens into text, and both into pieces, one for each window.

    Args:
        answer: the answer's text so far (a session taken over has some already).
        meter: counts what `usage` reports.
        writer: stores pieces and the end.
        timelines: add the session's timeline to telemetry.
        scorer: turns log-probabilities into entries; None where none are wanted.
        watch: follows the request for metrics and traces; None: nothing does.
    """

    def __init__(
        self, answer: AnswerText, meter: UsageMeter, writer: ResultWriter, timelines: bool = False,
        scorer: Scorer | None = None, watch: RequestWatch | None = None,
    ) -> None:  # fmt: skip
        self._answer = answer
        self._meter = meter
        self._writer = writer
        self._scorer = scorer
        self._timelines = timelines
        self._watch = watch
        self._pieces: list[Piece] = []
        self._committed: Commit | None = None  # what of the latest is not in a piece yet,
        self._texts: list[str] = []  # and the text of each of its tokens

    @property
    def stopped_at(self) -> int | None:
        return self._answer.num_tokens if self._answer.stopped else None

    @property
    def probe(self) -> str:
        return self._meter.probe

    def notify(self, effects: list[DecidedEffect], peer: Peer | None) -> None:
        over = self._answer.stopped  # what was judged after a stop string is not the user's
        for effect in effects:
            match effect:
                case Commit() if not over:
                    self._commit(effect, peer)
                case WindowJudged() if not over:
                    self._judged(effect, peer)
                case Finish(reason, error):
                    self._finish(FinishReason.STOP if self._answer.stopped else reason, error, peer)
                case _:
                    pass
        self._write_pieces()

    def sent(self, message: Message, size: int) -> None:
        self._meter.sent(message, size)

    def received(self, size: int) -> None:
        self._meter.bytes_down += size

    def drafted(self, start: int, num_tokens: int, draft_ms: float, ended_ms: float) -> None:
        self._meter.drafted(start, num_tokens, draft_ms, ended_ms)

    def failed(self, why: str) -> None:
        self._end(FinishReason.ERROR, why, Usage())

    def _commit(self, effect: Commit, peer: Peer | None) -> None:
        """Turn tokens into text, no further than a stop string."""
        texts = self._answer.push_each(effect.tokens)
        kept = len(texts)
        self._meter.committed(kept, None if peer is None else peer.record)
        self._committed = replace(
            effect, tokens=effect.tokens[:kept], accepted=effect.accepted[:kept],
            scores=effect.scores[:kept],
        )  # fmt: skip
        self._texts = texts

    def _judged(self, effect: WindowJudged, peer: Peer | None) -> None:
        """What a window has brought, of the text just committed."""
        effect = within(effect, len(self._texts))
        count, committed, texts = effect.num_committed, self._committed, self._texts
        if committed is None or not count:
            return  # a stop string came before it
        self._meter.judged(effect)
        if self._watch is not None:
            self._watch.judged(effect)
        self._pieces.append(
            Piece(
                committed.start, committed.tokens[:count], committed.accepted[:count],
                "".join(texts[:count]), tuple(map(len, texts[:count])),
                self._meter.entry(effect, peer), self._meter.probe, *self._scores(count),
            )
        )  # fmt: skip
        self._committed = replace(
            committed, start=committed.start + count, tokens=committed.tokens[count:],
            accepted=committed.accepted[count:], scores=committed.scores[count:],
        )  # fmt: skip
        self._texts = texts[count:]

    def _scores(self, count: int) -> tuple[tuple[ScoredToken, ...], tuple[ScoredToken, ...]]:
        """Of the first tokens of what is committed, and of the prompt before the first of all."""
        committed, scorer = self._committed, self._scorer
        if committed is None or not committed.scores or scorer is None:
            return (), ()
        scores = scorer.scored(committed.tokens[:count], committed.scores[:count])
        return scores, () if committed.start else scorer.prompt(committed.prompt_scores)

    def _finish(self, reason: FinishReason, error: str, peer: Peer | None) -> None:
        rest = "" if self._answer.stopped else self._answer.flush()
        if self._pieces:
            self._pieces[-1] = self._pieces[-1].with_text(rest)
        elif rest:
            self._pieces.append(Piece(self._answer.num_tokens, (), (), rest))
        self._write_pieces()
        entries: list[TelemetryEntry] = [*self._meter.rest(peer), self._meter.closing(reason)]
        if self._timelines:
            entries.append(self._meter.timeline_entry())
        self._end(reason, error, self._meter.usage(), *entries)

    def _end(
        self, reason: FinishReason, error: str, usage: Usage, *entries: TelemetryEntry
    ) -> None:
        self._writer.end(reason, error, usage, *entries)
        if self._watch is not None:
            self._watch.ended(reason, usage, error)

    def _write_pieces(self) -> None:
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            self._writer.put(piece)
