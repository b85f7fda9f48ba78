"""The operator's commands: a file for each `octet` command, and the helpers that they share."""
