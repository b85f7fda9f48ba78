"""The application on Kubernetes, and what watches it."""
