"""What `lvm.evaluate` and `lvm.compare` measure: perplexity, scores of answers, their pages."""
