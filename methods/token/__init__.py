"""The token methods, one published method per file. Imports `methods.engine` only."""
