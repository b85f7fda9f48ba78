"""The hardware: what a node can run, what a replica needs, and how many replicas fit on a card."""
