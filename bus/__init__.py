"""What travels and where it is kept: messages, codec, sockets, the Redis store, settings, client.

The package knows formats, keys and guarantees. It does not know the algorithm.
"""
