"""Safety-Aware Probing (arXiv 2505.16737): probe, losses, the step, and its diagnostics. Knows nothing of engines' insides."""
