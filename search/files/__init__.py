"""File access: atomic writes, locks between processes, cache folders and object storage.

Imports `search.errors` alone of this project. This is the only room that imports fsspec, pyarrow,
platformdirs and filelock. It knows nothing about studies, images or models.
"""
