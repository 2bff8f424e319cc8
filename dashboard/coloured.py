"""An answer's text with its origin in colour: which tokens the draft wrote, and where it failed.

Pure. Colours lie behind the text and are half transparent, so that they work on light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from bus.store import WindowEntry
from bus.store.entries import TokensEntry

DRAFT_COLOUR, TARGET_COLOUR, REFUSED_COLOUR = (
    "rgba(59, 130, 246, 0.28)", "rgba(16, 163, 127, 0.30)", "#ef4444",
)  # fmt: skip
LEGEND = (
    f'<span style="background:{DRAFT_COLOUR};border-radius:3px;padding:0 3px">drafted at the edge, '
    f'accepted</span> <span style="background:{TARGET_COLOUR};border-radius:3px;padding:0 3px">'
    "written by the target</span>"
)
REFUSED_LEGEND = f' <span style="color:{REFUSED_COLOUR}">✗n</span> n drafted tokens refused here'

_STYLE = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7"
_ORIGIN = {True: DRAFT_COLOUR, False: TARGET_COLOUR}


def as_html(pieces: Sequence[TokensEntry], windows: Sequence[WindowEntry] = ()) -> str:
    """The text; behind each piece whose window lost tokens, how many.

    Text that no token of its own piece brought (it had been held back), and pieces of a release
    that did not tell, are without colour.

    Args:
        windows: those of the same answer, in order; as far back as telemetry goes.
    """
    refused = _refused_at(windows, sum(len(piece.tokens) for piece in pieces))
    parts = []
    for piece in pieces:
        parts.append(_piece(piece))
        count = refused.get(piece.start + len(piece.tokens), 0) if piece.tokens else 0
        if count:
            parts.append(
                f'<sup style="color:{REFUSED_COLOUR}" title="{count} drafted tokens were refused '
                f'here">✗{count}</sup>'
            )
    return f'<div style="{_STYLE}">{"".join(parts)}</div>'


def _piece(piece: TokensEntry) -> str:
    if len(piece.lengths) != len(piece.tokens):
        return escape(piece.text)
    shown, at = [], 0
    for accepted, run in groupby(zip(piece.accepted, piece.lengths, strict=True), lambda x: x[0]):
        length = sum(each for _, each in run)
        text, at = piece.text[at : at + length], at + length
        if text:
            shown.append(
                f'<span style="background:{_ORIGIN[accepted]};border-radius:3px">'
                f"{escape(text)}</span>"
            )
    return "".join(shown) + escape(piece.text[at:])


def _refused_at(windows: Sequence[WindowEntry], num_tokens: int) -> dict[int, int]:
    """Tokens of the answer committed by then → drafted tokens that this feedback rejected.

    Telemetry may lack the first windows, so that positions are counted from the end.
    """
    at, found = num_tokens, dict[int, int]()
    for window in reversed(windows):
        if window.rollback:
            found[at] = window.num_drafted - window.num_accepted
        at -= window.num_committed
    return found


def why(window: WindowEntry, lossless: bool, judge: str = "") -> str:
    """Feedback in words.

    Args:
        judge: by what steps are judged, where the answer is written in steps.
    """
    if judge:
        if not window.rollback:
            return f"step accepted: alike by {judge}"
        return f"step refused by {judge}; the target's own step instead"
    if window.outcome == "own":
        return "the target's own, without a draft"
    if window.proposed:
        return (
            f"tree of {window.proposed} tokens, depth {window.num_drafted}: "
            f"{window.num_accepted} accepted"
        )
    if not window.rollback:
        return "all accepted" if window.num_accepted == window.num_drafted else "the answer ended"
    if window.outcome == "prehit_rejected":
        return "first token refused by the kept row, without a pass"
    test = (
        "the exact test" if lossless
        else f"the exact test, and more than {window.threshold:.2f} nats apart"
    )  # fmt: skip
    return f"token {window.num_accepted + 1} of {window.num_drafted} refused: {test}"
