"""The machinery beneath the methods: timm blocks, tokens, shapes, parameters and recipes. Imports
torch, timm and PyYAML only.
"""
