"""Cloud Storage: objects in one bucket, and how requests reach it."""

from keras_remote_airflow.core import posix as posix
