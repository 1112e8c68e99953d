"""MLflow as a mirror of the study: runs, views, and the model registry. The only room of search
that imports mlflow.
"""
