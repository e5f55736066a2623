"""From a request to pictures that carry the recipe by which they can be made again."""
