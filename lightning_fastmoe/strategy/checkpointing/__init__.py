"""Saving and loading under the strategy, with the hooks of Lightning around them."""
