"""`e2sci doctor`: checks of this machine, the installation and the running system, and the speed
to expect.

Every check is a function that returns `checks.Check` objects: `machine` looks at processor, memory
and packages, `models` at the files of the pair, `settings` at ports and keys, `system` at Redis and
the workers in it, and `network` measures the way to each cloud worker. `expect` predicts tokens a
second from measured times, `report` prints, and `run` puts them in order.
"""
