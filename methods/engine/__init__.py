"""The parts that all methods share: the reduced forward, tokens, shapes, parameters and recipes.

May import torch, timm and PyYAML, and no other package of `vitpareto.methods`.
"""
