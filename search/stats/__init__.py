"""Intervals, exact tests, confidence sequences and racing rules on arrays. The only room that
imports scipy.
"""
