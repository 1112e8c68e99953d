"""Gradient training: losses, the loop, checkpoints, fine-tuning, and preparations of methods.

May import stats, files, data, models and measure; not study, trials, export, tracking, compare,
ray, optuna, mlflow or onnx.
"""
