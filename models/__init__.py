"""What a graft is: the transformer, its operators, surgery on it, diffusion, files and costs. Torch only."""
