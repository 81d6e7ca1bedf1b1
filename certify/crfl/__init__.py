"""CRFL: certificates that training data changed by attackers in one round would not have changed a prediction."""
