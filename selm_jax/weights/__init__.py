"""Finds models, loads their weights onto the devices, and exports them.

Every source (a local folder, a GGUF file, a Hub id) is first turned into a local Hugging Face
folder with config.json, tokenizer files and safetensors (`sources.resolve`). Everything else reads
only such folders.
"""
