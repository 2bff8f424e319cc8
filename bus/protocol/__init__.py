"""What travels: messages and their fields, requests, arrays, the codec, and every error.

This room knows formats and nothing else: no sockets, no Redis, no settings. It is all of `bus`
that `decoding` may import.
"""
