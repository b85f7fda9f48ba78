"""A simulator for autoscaling policies: fleets, workloads, baselines and plots."""
