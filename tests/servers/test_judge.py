"""A judge on real servers: vLLM and llama.cpp tell what the model itself would."""
