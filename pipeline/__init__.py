"""Safety-preserving fine-tuning on sharded weights: SAP (arXiv 2505.16737) as a staged pipeline."""

__version__ = "0.1.0"
