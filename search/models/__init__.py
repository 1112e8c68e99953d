"""Models: loading by name, the embedded model, published checkpoint layouts, trained weights by
digest, and models that workers map.

May import data and files; not measure, training, study, ray, optuna, mlflow or onnx. Nothing is
measured or trained here.
"""
