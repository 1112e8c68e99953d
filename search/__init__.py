"""Finding the front: job, data, cost, trials, Optuna inside Ray Tune, and the study on disk."""
