"""The operator's commands, one or a few in each file, and the helpers that they share."""
