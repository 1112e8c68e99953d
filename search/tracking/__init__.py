"""MLflow as a mirror of the study on disk: runs, saved views, artifacts and the model registry.

`Tracker` (`tracker.py`) sends results while a search runs, `sync` (`sync.py`) makes a server equal
to a study, `register` (`registry.py`) adds a bundle to the model registry. The only package of
`search` that imports mlflow. It may import `search.study`, `search.export` and what is below them,
not `search.trials`, and it never changes a study.
"""
