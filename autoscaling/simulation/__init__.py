"""A simulator of autoscaling policies: fleets, workloads, baseline policies and plots."""
