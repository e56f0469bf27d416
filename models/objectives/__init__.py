"""What a model learns to predict, and the loss: Gaussian diffusion with a learned variance."""
