"""Data, hashes and Cloud Storage; nothing in this package knows Airflow."""
