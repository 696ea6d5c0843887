"""Cloud Storage: objects in one bucket, and how requests reach it."""
