"""Crisis detection on what a user writes: normalisation, features, a small classifier, and its measured figures."""
