"""What travels and where it is kept.

| room | what |
|---|---|
| `protocol` | messages, codec, arrays, requests, errors |
| `transport` | ZeroMQ sockets |
| `store` | everything in Redis |
| `runtime` | life cycle, heartbeat, logs and health of a worker process |
| `settings`, `client` | settings that all processes share; the client of the service |

The package knows formats, keys and guarantees. It does not know the algorithm.
"""
