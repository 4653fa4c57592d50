"""Models of Hugging Face, and of a GGUF file, in and out: `load.load_hf`, `save.save_hf`."""
