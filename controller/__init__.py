"""Control state of sessions in Redis, and the updates published from it."""
