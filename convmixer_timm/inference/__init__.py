"""Loading a model, predicting with it, and making that fast."""
