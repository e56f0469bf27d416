"""Latents that the rootstock draws of prompts, to learn from in place of images."""
