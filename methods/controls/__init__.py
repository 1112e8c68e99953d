"""The controls that every pruning method is compared with, one per file: the dense model, random
and centre patch dropping, and a smaller input. May import `methods.engine`, torch and timm.
"""
