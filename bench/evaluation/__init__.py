"""`e2sci bench`: methods × data sets × links on real processes, in one run, and its report.

Edge and cloud have one core each, with an emulated link between them; methods answer each prompt in
turns, so that what drifts hits all alike. What is kept of an answer is a row; a run that was cut
off goes on after its last row.

| module | what |
|---|---|
| `plan` | what is measured: methods, prompts, links, drafts |
| `baseline_server` | the target alone and co-located SD, in a process of their own |
| `colocated` | speculative decoding with both models in one process |
| `paddings` | contended times, and whether padding held |
| `answers` | one answer with the times at which its pieces came |
| `rows` | what is kept, on disk |
| `setting` | one link and draft: best static windows first, then all methods in turns |
| `summary` | a line for each method, data set and link, with intervals |
| `inertia` | are windows like those before them? |
| `report` | the HTML page, and the tables for a README |
| `run` | all of it |
"""
