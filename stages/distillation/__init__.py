"""Stage 1 of grafting: activations of the rootstock, and each scion learning to put them out."""
