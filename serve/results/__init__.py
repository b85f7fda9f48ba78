"""Where finished images are kept for clients that asked for a URL."""
