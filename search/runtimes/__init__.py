"""What runs a model: eager, compiled, CUDA graph, torch.export and onnxruntime."""
