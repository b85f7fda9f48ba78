"""How many replicas each pool should have, from queue depth."""
