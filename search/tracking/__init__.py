"""MLflow as a mirror of the study on disk: runs, saved views, artifacts and the model registry.

`Tracker` (`tracker.py`) sends results while a search runs, `sync` (`sync.py`) makes a server equal
to a study, `register` (`registry.py`) adds a bundle to the model registry. No study is changed.
The only room that may import mlflow. May import stats, files, runtimes, study and export; not
trials, training or compare.
"""
