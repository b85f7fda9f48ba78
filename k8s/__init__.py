"""Octet on Kubernetes: rendered manifests, and dashboards and alerts to monitor the application."""
