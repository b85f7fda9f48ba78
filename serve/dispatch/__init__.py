"""Dispatch: admission of calls, the fair queue, and the grants of replicas' slots to images."""
