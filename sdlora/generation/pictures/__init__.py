"""Picture files: their names, and the texts in them that tell how they were made."""
