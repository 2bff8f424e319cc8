"""Training code, outside the workers: drafts by distillation, calibrations with their predictor.

| room | what |
|---|---|
| `distill` | a draft for a target (`e2sci distill`) |
| `calibration` | what a pair does at each threshold, and the predictor (`e2sci calibrate`) |

No worker imports it, and it knows no worker.
"""
