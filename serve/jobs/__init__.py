"""Jobs, batches and webhooks: stored requests, and the deployment that runs them."""
