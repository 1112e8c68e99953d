"""The search for the front, in rooms: data, measurement, training, study, trials, export, MLflow.

The modules beside the rooms (errors, choices, versions, identity of the code) may be imported by
every room and import none of them. No room may import `clusters` or `dashboards`.
"""
