"""A model leaves for other people's tools, and comes from them."""
