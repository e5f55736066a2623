"""Pictures found by what made them."""
