"""What was charged: one usage record for each image, and the ledger that keeps them."""
