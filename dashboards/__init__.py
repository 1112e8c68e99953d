"""How a study is shown: tables, pictures, the explorer page, MLflow's web pages, and commands.

Renders what `search` measured; measures and chooses nothing. The only package that imports
matplotlib and plotly. It may import `search` and `methods`, not `clusters`, and mlflow nowhere:
`mlflow_server.py` starts MLflow as a process.
"""
