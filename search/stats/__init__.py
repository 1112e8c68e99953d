"""Statistics on arrays and counts: intervals, exact tests, confidence sequences, racing, Pareto
fronts.

The only room that may import scipy. May import `search.errors` and no other room. Nothing here
knows trials, studies or files.
"""
