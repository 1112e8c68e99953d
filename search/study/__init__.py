"""The study: job, folder on disk, results, search space, session, front, certificates and verdict.

Only this room imports optuna. It may import errors, stats, files, data, models, runtimes, measure
and training, but not trials, export, tracking or ray.
"""
