"""The structural methods, one published method per file. Imports `methods.engine` and
`methods.slicing` only.
"""
