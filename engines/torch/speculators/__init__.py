"""Speculators: small weights beside a target that read its hidden states and propose trees."""
