"""A served model on this cluster: weights on disk, reference work, replica bounds."""
