"""The result cache: images of repeated requests, in memory or in Redis."""
