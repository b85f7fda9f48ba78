"""The HTTP edge: ingress deployment, OpenAI wire format, playground page."""
