"""SAFT (arXiv 2410.10014): harmful samples found by the model's own hidden states, and left out of training."""
