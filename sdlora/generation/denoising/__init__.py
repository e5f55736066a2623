"""From noise to latents: the steps, what the UNet is given at each, and how they are followed from outside."""
