"""How messages travel: ZeroMQ sockets between edge, cloud and controller."""
