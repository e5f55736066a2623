"""The Stable Diffusion families: the home of diffusers and transformers models."""
