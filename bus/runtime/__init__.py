"""What every worker process shares: life cycle, heartbeat, logs, health check."""
