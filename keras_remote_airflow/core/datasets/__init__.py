"""Datasets: publish, look up, read back; what joins `disk` and `cloud`."""
