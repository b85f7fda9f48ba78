"""Who runs next: the queue, the grants, and each ingress's session with them."""
