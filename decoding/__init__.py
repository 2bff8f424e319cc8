"""The algorithm, pure: state machines, acceptance, sampling, methods.

No sockets, no Redis, no torch, no clock, no global random numbers: everything here is a function
of its arguments, so it can be enumerated, replayed and simulated.
"""
