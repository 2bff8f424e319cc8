"""An emulated link: a process between edge and cloud that delays the real sockets' bytes.

    profiles    what a link is like, and over time: the table of profiles, traces
    schedule    pure: when each packet comes out at the other end
    relay       sockets and the clock: holds bytes back until then, and measures how well
    accuracy    by how much it was late
    process     start and stop a link from a program

`python -m launch.link` is the process. Semantics and measured accuracy: docs/link.md.
"""

from __future__ import annotations

MODULE = __name__
"""What `python -m` starts."""
READY = "ready"
"""Its first word once it listens."""
