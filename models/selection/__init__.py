"""What sites hold: gates that learn it, budgets over a whole model, and a solver for scores that were measured."""
