"""`e2sci bench pace`: what drafting ahead brings, over lockstep and over the target alone.

One run on real processes, edge and cloud on one core each, an emulated link between them. First
with a draft model, then with oracle drafts, which show what a pace does at the acceptance that
large pairs have.

| module | what |
|---|---|
| `plan` | what is measured: round trips, drafts, prompts, repetitions |
| `alone` | the target alone, and the answers that oracles replay |
| `stacks` | one draft over one link: the best static window, then all methods in turns |
| `rows` | what is kept of an answer, on disk |
| `summary` | medians, spreads, ratios, the ceiling; the table |
| `run` | all of it, resumable |
"""
