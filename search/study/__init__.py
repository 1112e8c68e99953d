"""The study: job, folder on disk, results, search space, session, front, certificates and verdict.

The only room that may import optuna and sqlalchemy. May import stats, files, data, models, measure
and training; not runtimes, trials, export, tracking, compare or ray.
"""
