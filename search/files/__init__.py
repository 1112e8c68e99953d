"""File access: atomic writes, locks between processes, cache folders and object storage.

The only room that may import fsspec, pyarrow, platformdirs and filelock. May import `search.errors`
and no other room. Nothing here knows studies, images or models.
"""
