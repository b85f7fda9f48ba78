"""The result store: finished images that are answered as URLs, and the signed links to them."""
