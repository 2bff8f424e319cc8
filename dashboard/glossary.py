"""What the words on the dashboard mean, once for all charts, tables and tiles.

Knows words only. A term missing here is a KeyError where it is used, so no help text goes blank.
"""

from __future__ import annotations

from types import MappingProxyType

TERMS = MappingProxyType(
    {
        "goodput": (
            "Tokens of finished text per second: drafted tokens the target accepted, plus the "
            "tokens it wrote itself. Guesses that were thrown away do not count."
        ),
        "acceptance": (
            "Of the tokens the draft model guessed, the share the target model accepted. "
            "Higher means fewer wasted guesses. Counted as accepted ÷ drafted; guesses that agree "
            "with what the target had already written count as accepted."
        ),
        "rollback": (
            "The target refused a guessed token, so the edge threw away everything it had drafted "
            "after that point and went on from the target's token. Costs drafting time, never "
            "correctness; with “auto” and “e2sci” the target writes on meanwhile."
        ),
        "rollback share": (
            "Of all windows, the share in which the target refused a token, so that a rollback "
            "followed. One refused token is enough, however many were accepted before it."
        ),
        "window": (
            "The few tokens an edge drafts and sends to the cloud at once, with the place in the "
            "text that they follow. The window size is how many."
        ),
        "step": (
            "A part of an answer up to a blank line, with “lookahead”: the draft writes it ahead, "
            "the target writes its own version, and a judge decides whether the draft’s is kept."
        ),
        "threshold": (
            "How far draft and target may disagree (Jensen-Shannon divergence in nats, at most "
            "ln 2 ≈ 0.69) for a token still to be accepted. Higher is more lenient and lossy. "
            "Lossless methods do not use it and show “exact”."
        ),
        "credit": (
            "The controller's running average of how much of a window the target accepts, from "
            "0 to 1. Text that was easy a moment ago tends to stay easy; adaptive methods let "
            "a client with high credit draft further."
        ),
        "in flight": (
            "Tokens an edge has drafted and sent that the target has not judged yet. Methods that "
            "draft ahead keep several windows in flight to hide the way to the cloud."
        ),
        "own pass": (
            "A run of the target model without any guess to check: it writes the next token by "
            "itself, so that it never waits for an edge."
        ),
        "tree": (
            "Tokens that a speculator beside the target proposes for one pass, some of them as "
            "alternatives to each other. The target accepts one path through them; the depth is "
            "the longest path there is."
        ),
        "steering": (
            "Credit is how well the recent windows went; the threshold is how far draft and target "
            "may disagree. Where credit steers, the second follows the first."
        ),
        "lossless": (
            "The text is exactly the target model's own, only sooner. A lossy method may differ "
            "from it: it trades some quality for speed."
        ),
        "committed": "Tokens that are final and already streamed to whoever asked.",
        "draft model": "The small, fast model on the edge that guesses tokens ahead.",
        "target model": "The large model in the cloud whose text counts; it checks the guesses.",
        "edge": (
            "A worker near the user. It runs the draft model and streams the answer. A thin client "
            "is an edge without a draft model."
        ),
        "cloud": "A worker that runs the target model and checks the edges' windows.",
        "middle": (
            "A worker between draft and target (method pipespec): its model checks the edge's "
            "drafts, and what it writes are the drafts that the cloud checks."
        ),
        "controller": (
            "The process that sets threshold and window size of each session. Nobody waits for "
            "it: while it is away, sessions keep their last settings."
        ),
        "session": "One prompt being answered, from the moment an edge takes it up.",
        "client": "Who asked, as named in the request. Credit is kept per client.",
        "queue": "Prompts that no edge has taken up yet.",
        "heartbeat": (
            "Each worker renews its registration about once a second. After several seconds "
            "without a renewal it counts as down."
        ),
        "load": "Sessions the worker has now, out of the most it takes at once.",
        "counters": "What a worker counted since it started, such as refused messages.",
        "role": (
            "An edge drafts and streams answers, a cloud worker checks drafts, a middle worker "
            "does a bit of both, the controller sets how far to draft."
        ),
        "finish reason": (
            "stop: the model ended its answer or a stop text came. length: the token limit. "
            "cancelled: the asker gave up. error: see the answer's error text."
        ),
        "given up": "Prompts dropped because edges failed three times while answering them.",
        "delivery": "How often an edge has taken this prompt up; more than 1 after an edge failed.",
    }
)
"""Term → one or two sentences for a newcomer."""

SHOWN_AT_THE_BOTTOM = (
    "draft model",
    "target model",
    "edge",
    "cloud",
    "middle",
    "controller",
    "session",
    "window",
    "committed",
    "goodput",
    "acceptance",
    "rollback",
    "own pass",
    "threshold",
    "credit",
    "lossless",
)
"""The order in which the page's glossary lists them: each word after those it needs."""


def as_markdown() -> str:
    """The page's glossary as a Markdown list."""
    return "\n".join(f"- **{term.capitalize()}**: {TERMS[term]}" for term in SHOWN_AT_THE_BOTTOM)
