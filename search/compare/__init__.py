"""Published figures, cost tables, reproduction of published accuracies, and token traces.

A study is needed only to trace one of its trials. May import stats, data, models, measure and
study; not files, training, trials, export or tracking. Its commands start without Ray and Optuna.
"""
