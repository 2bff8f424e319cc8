"""The process tree of one machine: supervisor, embedded Valkey server, the whole stack."""
