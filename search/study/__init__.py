"""The study on disk: its folder, job, results, Optuna storage and space, front, certificates,
verdict.
"""
