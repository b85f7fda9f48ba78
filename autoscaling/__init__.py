"""Autoscaling: how many replicas each pool should have, from arriving and queued work."""
