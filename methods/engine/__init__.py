"""The parts that all methods share: the reduced forward, tokens, shapes, parameters and recipes.

May import torch and timm (`recipe_yaml` alone PyYAML), and no other package of `vitpareto.methods`.
"""
