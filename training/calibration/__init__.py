"""Calibration: what the pair does at each threshold, and the predictor trained on that.

| module | what |
|---|---|
| `records` | one row for each window that was tried; Parquet |
| `table` | bins of credit × thresholds: time, length, quality; the labels |
| `predictor` | the network, trained first on the labels, then on the paper's objective |

`bench.calibrate` runs the pair and writes the result in the format of `controller.calibration`,
which is what the controller reads.
"""
