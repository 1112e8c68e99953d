"""Gradient training: losses, the loop, checkpoints, fine-tuning, and training shared by many
trials.
"""
