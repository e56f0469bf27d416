"""Measures of models and of samples: costs, locality of attention, distances."""
