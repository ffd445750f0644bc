"""A small neural speech codec with residual vector quantization; see examples/README.md."""
