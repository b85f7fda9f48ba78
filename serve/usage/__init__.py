"""Usage: one record for each charged image, and the ledger that keeps the records."""
