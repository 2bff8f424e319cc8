"""`e2sci bench gateway`: what the HTTP door adds to the queue, and how it holds under load."""
