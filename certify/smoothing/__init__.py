"""Votes of a model whose parameters carry Gaussian noise: counted, sampled in logit space, or exact."""
