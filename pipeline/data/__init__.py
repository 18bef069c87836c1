"""Data: sources -> messages -> tokens and labels; contrastive pairs; built-in sets; batches."""
