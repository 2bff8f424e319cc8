"""The front door: an HTTP server with OpenAI's API, metrics and health checks.

A client of the queue like any other: it holds no state beyond its open connections, so several may
run side by side.
"""
