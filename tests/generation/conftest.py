from every_family import shape  # noqa: F401
