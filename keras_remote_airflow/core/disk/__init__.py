"""Local files: walk them, hash them, put a directory in place as a whole."""

from keras_remote_airflow.core import posix as posix
