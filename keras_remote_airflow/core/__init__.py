"""Data, hashes and Cloud Storage; nothing in this package knows Airflow."""

__version__ = "0.1.0"
