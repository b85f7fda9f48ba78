"""The request path: HTTP request in, image bytes out."""
