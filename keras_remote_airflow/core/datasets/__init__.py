"""Datasets: publish, look up, read back. This package combines `disk` and `cloud`."""
