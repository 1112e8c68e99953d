"""The structural methods, one published method per file: NViT and ReViT.

May import `methods.slicing` and `methods.engine`, torch and timm.
"""
