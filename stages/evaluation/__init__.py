"""How good a model is: samples, the judges that look at them, the reference, and the table."""
