"""Which tokens are the same."""
