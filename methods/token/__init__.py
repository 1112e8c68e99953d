"""The token methods, one published method per file (RAJNI: a folder).

May import `methods.engine`, torch and timm.
"""
