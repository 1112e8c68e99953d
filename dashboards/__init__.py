"""How a study is shown: tables, pictures, the explorer page, MLflow's web pages, and commands.

Renders what `search` measured; measures and chooses nothing. The only room that may import
matplotlib and plotly. May import `search` and `methods`; not `clusters` or mlflow
(`mlflow_server.py` starts MLflow as a process).
"""
