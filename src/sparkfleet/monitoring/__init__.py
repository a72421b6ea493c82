"""Monitoring: what Prometheus scrapes, what it records, and of what it warns."""
