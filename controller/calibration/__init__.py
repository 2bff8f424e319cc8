"""Calibration: what the pair does at each threshold, and the predictor trained on that.

| module | what |
|---|---|
| `records` | one row for each window that was tried; Parquet |
| `table` | bins of credit × thresholds: time, length, quality; the labels |
| `training` | the network, first on the labels, then on the paper's objective |
| `files` | predictor, neutral credit and safe thresholds in one file, with what they hold for |

Who runs the pair is `bench.calibrate`: this package only makes something of its windows.
"""
