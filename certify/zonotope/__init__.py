"""Bounds on a network's logits over all inputs of an l_inf ball: zonotopes, linear bounds, intervals."""

from certify.zonotope.robustness import ZonotopeResult, check, margin_bounds

__all__ = ["ZonotopeResult", "check", "margin_bounds"]
