"""Hundreds of pictures: what is asked for, what is there, and making the rest."""
