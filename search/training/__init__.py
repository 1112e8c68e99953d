"""Gradient training: losses, the loop, checkpoints, fine-tuning, and preparations of methods.

May import methods, and of search: stats, files, data, models, measure. May not import ray, optuna,
mlflow, onnx, or any room above it (study, trials, export, tracking, compare, commands).
"""
