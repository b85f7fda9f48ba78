"""Jobs and batches: work that is stored, runs without an open connection, and is never lost."""
