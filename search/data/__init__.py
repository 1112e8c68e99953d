"""Images with labels: datasets by folder or name, splits, order, decoding, the embedded images.

`datasets.open_data` is the entry point. May import files; not models, measure, study, ray, optuna,
mlflow or onnx. Files of the user are only read.
"""
