"""A small VQ-VAE on photographs that come inside pip packages; see examples/README.md."""
