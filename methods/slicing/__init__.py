"""Structural slicing: widths, importance scores and models cut to smaller dimensions. Imports
`methods.engine` only.
"""
