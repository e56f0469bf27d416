"""From images to latents: the codec, and the work of the `features` stage."""
