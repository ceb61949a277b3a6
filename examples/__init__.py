"""Examples, which use the library and the tools."""
