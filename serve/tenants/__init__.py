"""Tenants: their shares and limits, their API keys, and the database and files that hold both."""
