"""Loading and running language models: weights, tokenizers, precision, KV caches, the draft's head.

Knows torch and transformers. Does not know sessions, sockets, Redis or the algorithm.
"""
