"""`e2sci bench int8`: what running a pair in int8 costs in quality, and what it brings in speed."""
