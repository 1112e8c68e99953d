"""Published figures, cost tables, reproduction of published accuracies, and token traces.

Needs no study, except to show one of its trials. May import `search.measure`, `search.models`,
`search.data`, `search.study` and what is below them; not `search.trials`, `search.export` or
`search.tracking`. The commands here start without Ray and Optuna.
"""
