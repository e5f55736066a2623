"""Larger pictures: a second pass over one made small, and ESRGAN models."""
