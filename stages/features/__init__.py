"""From images to latents: data sources, how an image is read, the codec, and the `features` stage."""
