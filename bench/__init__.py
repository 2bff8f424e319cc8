"""Measuring: pass and overhead timings, exactness runs."""
