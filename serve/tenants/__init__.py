"""Who may call: tenants, their keys, and the files that hold both."""
