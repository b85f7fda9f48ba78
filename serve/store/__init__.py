"""The store: one SQL database, SQLite or PostgreSQL, for what must never be lost."""
