"""Training: what one plain step computes, the loop around any step, and checkpoints."""
