"""Atomic writes, locks, cache folders and object storage. The only room that imports fsspec and
pyarrow.
"""
