"""The operator's commands: one or a few `octet` commands in each file, and the helpers that they share."""
