"""The hardware: what a node can do, what a replica needs, how many fit on a card."""
