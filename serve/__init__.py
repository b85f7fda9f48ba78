"""The server: from the HTTP request for images to their bytes, and the operator's commands."""
