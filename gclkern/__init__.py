"""Fused losses for long-tailed recognition: Gaussian clouded logits (GCL) and the DRO-LT bound."""
