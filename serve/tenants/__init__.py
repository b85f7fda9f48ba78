"""Tenants: their shares and limits, their API keys, and the files that hold both."""
