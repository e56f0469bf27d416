"""What a graft is: the transformer, its operators, surgery on it, its diffusion, its files and its costs. Torch only."""
