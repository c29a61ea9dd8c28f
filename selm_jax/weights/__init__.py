"""Weights: where a model comes from, and how its tensors reach the devices.

Every source (a local folder, a GGUF file, a Hub id) first becomes ONE thing: a local Hugging Face
folder with config.json, tokenizer files and safetensors (`sources.resolve`). Everything downstream
reads such folders and nothing else.
"""
