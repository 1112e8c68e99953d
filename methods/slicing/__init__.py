"""Structural slicing: widths, importance scores, and models cut to smaller widths.

May import `methods.engine`, torch and timm.
"""
