"""craftune: align a text-to-image diffusion model with reward models."""
