"""Data sets by folder, name and shard: decoding, splits, and the embedded images."""
