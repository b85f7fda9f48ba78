"""The demo model that Octet serves by default: a small model in SD3.5's shape, and its training."""
