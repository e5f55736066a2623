"""A picture made again: what it was made from is found by hash, and the pixels are compared."""
