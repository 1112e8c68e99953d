"""What a model costs and gets right: MACs, parameters, memory, accuracy and latency."""
