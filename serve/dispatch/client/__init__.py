"""An Ingress's half of the dispatch protocol: its session, open calls and refusals."""
