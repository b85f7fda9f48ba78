"""The HTTP edge: the Ingress deployment, OpenAI's wire formats and the playground page."""
