"""Pictures that begin at another picture: what is read of it, what a mask keeps, and its latents."""
