"""The operator's commands: one file for each `octet` command, and what they print."""
