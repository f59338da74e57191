"""Takes a model away from Python: ONNX graphs, in float32 and int8, and the engines that compute them."""
