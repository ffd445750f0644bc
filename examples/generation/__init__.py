"""Image generation: a VQ-VAE as tokenizer, and a transformer that learns the distribution of its tokens."""
