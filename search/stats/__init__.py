"""Statistics on arrays and counts: intervals, exact tests, confidence sequences, racing, Pareto
fronts.

Imports numpy, scipy and `search.errors`; the only room that may import scipy. It may not import
other rooms: nothing here knows trials, studies or files.
"""
